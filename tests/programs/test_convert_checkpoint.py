"""The command line, on a file of the published names with small tensors."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from codetr_d2_programs import convert_checkpoint as script

ROOT = Path(__file__).parents[2]
KEYS = ROOT / "tests" / "reference" / "data" / "keys" / "co_dino_5scale_vit_large_coco.json"


@pytest.fixture
def published(tmp_path):
    names = [name for name in json.loads(KEYS.read_text()) if name != "_meta"]
    path = tmp_path / "published.pth"
    torch.save(
        {"meta": {"epoch": 12}, "state_dict": {k: torch.full((2,), float(i)) for i, k in enumerate(names)}}, path
    )
    return path


def run(*args):
    """(exit status, None where it ends by itself)"""
    try:
        script.main([str(x) for x in args])
    except SystemExit as error:
        return error.code
    return None


def test_there_and_back(published, tmp_path, capsys):
    ours, back = tmp_path / "ours.pth", tmp_path / "back.pth"
    assert run(published, ours) is None
    printed = capsys.readouterr().out
    assert printed.count("\n") == 3 and "(a table of rotary positions" in printed
    converted = torch.load(ours, weights_only=True)
    assert "backbone.net.blocks.0.norm1.weight" in converted["model"]
    assert run(ours, back, "--to-published") is None
    first, second = (torch.load(path, weights_only=True) for path in (published, back))
    assert list(first) == list(second) and first["meta"] == second["meta"]
    assert list(first["state_dict"]) == list(second["state_dict"])
    assert all(torch.equal(x, second["state_dict"][name]) for name, x in first["state_dict"].items())
    assert sorted(os.listdir(tmp_path)) == ["back.pth", "ours.pth", "published.pth"]


def test_config_of_a_model_trained_here(published, tmp_path, capsys):
    ours, back, config = tmp_path / "ours.pth", tmp_path / "back.pth", tmp_path / "config.yaml"
    run(published, ours)
    torch.save({"model": torch.load(ours, weights_only=True)["model"]}, ours)
    assert run(ours, back, "--to-published") == 2 and not back.exists()
    assert "--config-file" in capsys.readouterr().err
    config.write_text("MODEL:\n  EVA02:\n    WINDOW_SIZE: 24\n")
    assert run(ours, back, "--to-published", "--config-file", config) is None
    weights = torch.load(back, weights_only=True)["state_dict"]
    assert weights.keys() == torch.load(published, weights_only=True)["state_dict"].keys()
    assert weights["backbone.rope_win.freqs_cos"].shape == (576, 64)


def test_nothing_is_overwritten_unasked(published, tmp_path, capsys):
    output = tmp_path / "ours.pth"
    output.write_bytes(b"precious")
    assert run(published, output) == 2
    assert output.read_bytes() == b"precious" and "--overwrite" in capsys.readouterr().err
    assert run(published, output, "--overwrite") is None
    assert "model" in torch.load(output, weights_only=True)


@pytest.mark.parametrize("damage", ["truncated", "gone", "other", "folder"])
def test_faulty_files_are_one_line(published, tmp_path, capsys, damage):
    output = tmp_path / "ours.pth"
    if damage == "truncated":
        published.write_bytes(published.read_bytes()[:1000])
    elif damage == "gone":
        published.unlink()
    elif damage == "other":
        torch.save({"conv1.weight": torch.zeros(1)}, published)
    else:
        output = tmp_path / "no_folder" / "ours.pth"
    assert run(published, output) == 2
    message = capsys.readouterr().err
    named = output if damage == "folder" else published
    assert message.startswith(f"error: {named}") and message.count("\n") == 1
    assert not output.exists()


@pytest.mark.slow
def test_two_conversions_at_once(published, tmp_path):
    """Into one file: it is whole, and nothing else is left."""
    assert run(published, tmp_path / "alone.pth") is None
    both = tmp_path / "both.pth"
    command = [sys.executable, "-W", "ignore", "-m", "codetr_d2_programs", "convert-checkpoint"]
    command += [published, both, "--overwrite"]
    jobs = [subprocess.Popen(command, cwd=ROOT) for _ in range(2)]
    assert [job.wait() for job in jobs] == [0, 0]
    first, second = (torch.load(tmp_path / name, weights_only=True)["model"] for name in ("alone.pth", "both.pth"))
    assert list(first) == list(second) and all(torch.equal(x, second[name]) for name, x in first.items())
    assert sorted(os.listdir(tmp_path)) == ["alone.pth", "both.pth", "published.pth"]


def test_where_nothing_can_be_written(published, tmp_path, capsys, monkeypatch):
    """It is found before the file is read."""
    monkeypatch.setattr(script, "load_torch", lambda path: pytest.fail("the file was read"))
    (tmp_path / "folder").mkdir()
    for output, message in (
        (published / "x.pth", "there is no folder"),
        ("/proc/x.pth", "/proc: nothing can be written into this folder"),
        (tmp_path / "folder", "is a folder; name the file to write"),
    ):
        assert run(published, output, "--overwrite") == 2
        printed = capsys.readouterr().err
        assert message in printed and printed.count("\n") == 1


def test_a_full_disk(published, tmp_path, capsys, limit_files):
    with limit_files(1000):
        assert run(published, tmp_path / "ours.pth") == 2
    assert capsys.readouterr().err.startswith(f"error: {tmp_path}/ours.pth: cannot be written: File too large")
    assert os.listdir(tmp_path) == ["published.pth"]


def test_weights_that_are_not_finite(published, tmp_path, capsys):
    data = torch.load(published, weights_only=True)
    data["state_dict"]["query_head.transformer.level_embeds"][0] = float("nan")
    torch.save(data, published)
    assert run(published, tmp_path / "ours.pth") == 2
    assert "published.pth: NaN or infinity in query_head." in capsys.readouterr().err
    assert os.listdir(tmp_path) == ["published.pth"]
