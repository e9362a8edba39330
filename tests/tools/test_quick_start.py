"""The quick start's report, on the output folder of a model that has learnt nothing. Training: tests/end_to_end."""

import json
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pytest
from PIL import Image

from codetr_d2.errors import InputError
from tests.tiny_run import write_tiny_run

pytestmark = pytest.mark.slow

FINAL = {"AP": 61.04, "AP50": 72.5, "AP75": 65.0, "APs": 55.0, "APm": 70.0, "APl": float("nan")}


def metrics_lines():
    lines = [{"iteration": i, "total_loss": 50.0 / (i + 1), "loss_cls": 1.0} for i in range(0, 100, 20)]
    lines.insert(3, {"iteration": 40, "bbox/AP": 20.0, "bbox/AP50": 30.0})
    return [*lines, {"iteration": 100} | {f"bbox/{name}": value for name, value in FINAL.items()}]


@pytest.fixture
def quick_start(tool, tmp_path, monkeypatch):
    """The script, with datasets and outputs in a temporary folder, and the commands that it would run."""
    prepare_digits = tool("prepare_digits")
    monkeypatch.setattr(prepare_digits, "NUM_IMAGES", {"train": 2, "test": 9})
    script = tool("quick_start")
    commands = []

    def run(command):
        commands.append(command)
        return SimpleNamespace(returncode=0)

    monkeypatch.setattr(script, "subprocess", SimpleNamespace(run=run))
    monkeypatch.setattr(script.prepare_efficientnet, "prepare", lambda file: None)
    monkeypatch.setattr(script, "DATASETS", tmp_path / "datasets")
    monkeypatch.setattr(script, "NUM_PICTURES", 2)  # drawing takes longest
    script.really_write_report = script.write_report  # but for this, which one test calls
    monkeypatch.setattr(script, "write_report", lambda output: (output / "report.html").write_text("a page"))
    monkeypatch.chdir(tmp_path)  # main() changes the folder: monkeypatch brings it back
    script.commands = commands
    return script


@pytest.fixture
def make_run(quick_start, tmp_path):
    """Write the output folder of a run, finished or not."""

    def make(finished=True):
        digits = tmp_path / "datasets" / "digits"
        name = f"{tmp_path.name}_"
        triples = [[f"{name}{x}", str(digits / x), str(digits / f"{x}.json")] for x in ("train", "test")]
        output = tmp_path / "output"
        write_tiny_run(output, triples)
        lines = metrics_lines()
        if not finished:
            (output / "model_final.pth").rename(output / "model_0000059.pth")
            (output / "last_checkpoint").write_text("model_0000059.pth")
            lines = lines[:-2]
        text = "".join(json.dumps(x) + "\n" for x in lines).replace("NaN", "null")
        (output / "metrics.json").write_text(text)
        return output

    return make


def run_main(script, monkeypatch, *arguments):
    monkeypatch.setattr(sys, "argv", ["quick_start.py", "digits", *map(str, arguments)])
    script.main()


def test_report_of_a_finished_run(quick_start, make_run, monkeypatch, capsys):
    output = make_run()
    monkeypatch.setattr(quick_start, "write_report", quick_start.really_write_report)
    run_main(quick_start, monkeypatch, "--output", output)
    assert quick_start.commands == []  # nothing is trained
    printed = capsys.readouterr().out
    assert "holds a finished run" in printed
    table = [line for line in printed.splitlines() if line.startswith("|")]
    assert [x.strip() for x in table[0].strip("|").split("|")] == list(FINAL)
    assert [x.strip() for x in table[2].strip("|").split("|")] == ["61.0", "72.5", "65.0", "55.0", "70.0", "nan"]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["AP"] == {**FINAL, "APl": None}
    assert summary["next_command"] in printed
    for file in summary["files"].values():
        assert file in printed
    assert "<title>output: report</title>" in (output / "report.html").read_text()
    for name in ("predictions.png", "curves.png"):
        pixels = np.asarray(Image.open(output / name).convert("RGB"))
        assert min(pixels.shape[:2]) > 400 and len(np.unique(pixels.reshape(-1, 3), axis=0)) > 20


def test_report_of_a_run_with_masks(quick_start, make_run, monkeypatch, capsys):
    """Masks have a table and curves of their own."""
    output = make_run()
    lines = metrics_lines()
    lines[-1] |= {f"segm/{name}": value / 2 for name, value in FINAL.items()}
    (output / "metrics.json").write_text("".join(json.dumps(x) + "\n" for x in lines))
    run_main(quick_start, monkeypatch, "--output", output)
    printed = capsys.readouterr().out
    assert "Box AP on" in printed and "Mask AP on" in printed
    rows = [line for line in printed.splitlines() if line.startswith("|")]
    assert [x.strip() for x in rows[5].strip("|").split("|")] == ["30.5", "36.2", "32.5", "27.5", "35.0", "nan"]
    summary = json.loads((output / "summary.json").read_text())
    assert summary["AP"] == {**FINAL, "APl": None}
    assert summary["mask_AP"] == {**{k: v / 2 for k, v in FINAL.items()}, "APl": None}


def test_each_picture_is_drawn_once_where_there_are_few(quick_start, make_run, monkeypatch):
    """The test set has nine pictures."""
    output, files, read = make_run(), [], quick_start.read_image
    monkeypatch.setattr(quick_start, "read_image", lambda file, kind: files.append(file) or read(file, kind))
    for number, drawn in ((2, ["0001.png", "0005.png"]), (20, [f"000{i}.png" for i in range(1, 10)])):
        monkeypatch.setattr(quick_start, "NUM_PICTURES", number)
        files.clear()
        run_main(quick_start, monkeypatch, "--output", output)
        assert [file.rsplit("/", 1)[1] for file in files] == drawn


@pytest.mark.parametrize("model", ["co_dino", "co_conditional_detr", "co_dab_detr"])
def test_other_model(quick_start, monkeypatch, tmp_path, model):
    """The config of the model, and no training where there is none."""
    quick_start.subprocess.run = lambda command: quick_start.commands.append(command) or SimpleNamespace(returncode=2)
    with pytest.raises(SystemExit, match="exit code 2"):
        run_main(quick_start, monkeypatch, "--model", model, "--output", tmp_path / "output")
    command = quick_start.commands[0]
    config_file = command[command.index("--config-file") + 1]
    assert f"{model}_" in config_file and (quick_start.ROOT / config_file).is_file()
    monkeypatch.setattr(sys, "argv", ["quick_start.py", "trees", "--model", model])
    with pytest.raises(InputError, match=f"--model {model}: there is no .*trees.yaml"):
        quick_start.main()


def test_next_command_works(quick_start, make_run, monkeypatch):
    output = make_run()
    run_main(quick_start, monkeypatch, "--output", output)
    command = json.loads((output / "summary.json").read_text())["next_command"]
    result = subprocess.run(command, shell=True, cwd=quick_start.ROOT, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert {x.name for x in (output / "demo").iterdir()} == {"0001.png", "detections.json"}


def test_new_and_interrupted_runs(quick_start, make_run, monkeypatch, tmp_path):
    output = tmp_path / "output"

    def finish(command):
        quick_start.commands.append(command)
        make_run()
        return SimpleNamespace(returncode=0)

    quick_start.subprocess.run = finish
    run_main(quick_start, monkeypatch, "--output", output)
    (command,) = quick_start.commands
    assert command[1] == "train_net.py" and "--resume" not in command
    assert command[-2:] == ["OUTPUT_DIR", str(output)]
    assert (quick_start.ROOT / command[command.index("--config-file") + 1]).is_file()
    assert json.loads((output / "summary.json").read_text())["resumed"] is False

    quick_start.set_aside(output)
    make_run(finished=False)
    run_main(quick_start, monkeypatch, "--output", output)
    assert "--resume" in quick_start.commands[1]
    assert json.loads((output / "summary.json").read_text())["resumed"] is True


def test_fresh_keeps_the_older_run(quick_start, make_run, monkeypatch, tmp_path):
    output = make_run()

    def finish(command):
        assert not output.exists()
        make_run()
        return SimpleNamespace(returncode=0)

    quick_start.subprocess.run = finish
    for i in (1, 2):
        run_main(quick_start, monkeypatch, "--output", output, "--fresh")
        assert (tmp_path / f"output.{i}" / "model_final.pth").is_file()


def test_training_that_stops(quick_start, monkeypatch, tmp_path):
    quick_start.subprocess.run = lambda command: SimpleNamespace(returncode=2)
    with pytest.raises(SystemExit, match="exit code 2.*again to go on"):
        run_main(quick_start, monkeypatch, "--output", tmp_path / "output")
