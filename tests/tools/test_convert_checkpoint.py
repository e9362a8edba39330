"""The command line, on a file of the published names with small tensors."""

import json
import os
from pathlib import Path

import pytest
import torch

KEYS = Path(__file__).parents[1] / "reference" / "data" / "keys" / "co_dino_5scale_vit_large_coco.json"


@pytest.fixture
def script(tool):
    return tool("convert_checkpoint")


@pytest.fixture
def published(tmp_path):
    names = [name for name in json.loads(KEYS.read_text()) if name != "_meta"]
    path = tmp_path / "published.pth"
    torch.save(
        {"meta": {"epoch": 12}, "state_dict": {k: torch.full((2,), float(i)) for i, k in enumerate(names)}}, path
    )
    return path


def run(script, *args):
    """(exit status, None where it ends by itself)"""
    try:
        script.main([str(x) for x in args])
    except SystemExit as error:
        return error.code
    return None


def test_there_and_back(script, published, tmp_path, capsys):
    ours, back = tmp_path / "ours.pth", tmp_path / "back.pth"
    assert run(script, published, ours) is None
    printed = capsys.readouterr().out
    assert printed.count("\n") == 3 and "(a table of rotary positions" in printed
    converted = torch.load(ours, weights_only=True)
    assert "backbone.net.blocks.0.norm1.weight" in converted["model"]
    assert run(script, ours, back, "--to-published") is None
    first, second = (torch.load(path, weights_only=True) for path in (published, back))
    assert list(first) == list(second) and first["meta"] == second["meta"]
    assert list(first["state_dict"]) == list(second["state_dict"])
    assert all(torch.equal(x, second["state_dict"][name]) for name, x in first["state_dict"].items())
    assert sorted(os.listdir(tmp_path)) == ["back.pth", "ours.pth", "published.pth"]


def test_config_of_a_model_trained_here(script, published, tmp_path, capsys):
    ours, back, config = tmp_path / "ours.pth", tmp_path / "back.pth", tmp_path / "config.yaml"
    run(script, published, ours)
    torch.save({"model": torch.load(ours, weights_only=True)["model"]}, ours)
    assert run(script, ours, back, "--to-published") == 2 and not back.exists()
    assert "--config-file" in capsys.readouterr().err
    config.write_text("MODEL:\n  EVA02:\n    WINDOW_SIZE: 24\n")
    assert run(script, ours, back, "--to-published", "--config-file", config) is None
    weights = torch.load(back, weights_only=True)["state_dict"]
    assert weights.keys() == torch.load(published, weights_only=True)["state_dict"].keys()
    assert weights["backbone.rope_win.freqs_cos"].shape == (576, 64)


def test_nothing_is_overwritten_unasked(script, published, tmp_path, capsys):
    output = tmp_path / "ours.pth"
    output.write_bytes(b"precious")
    assert run(script, published, output) == 2
    assert output.read_bytes() == b"precious" and "--overwrite" in capsys.readouterr().err
    assert run(script, published, output, "--overwrite") is None
    assert "model" in torch.load(output, weights_only=True)


@pytest.mark.parametrize("damage", ["truncated", "gone", "other", "folder"])
def test_faulty_files_are_one_line(script, published, tmp_path, capsys, damage):
    output = tmp_path / "ours.pth"
    if damage == "truncated":
        published.write_bytes(published.read_bytes()[:1000])
    elif damage == "gone":
        published.unlink()
    elif damage == "other":
        torch.save({"conv1.weight": torch.zeros(1)}, published)
    else:
        output = tmp_path / "no_folder" / "ours.pth"
    assert run(script, published, output) == 2
    message = capsys.readouterr().err
    named = output if damage == "folder" else published
    assert message.startswith(f"error: {named}") and message.count("\n") == 1
    assert not output.exists()
