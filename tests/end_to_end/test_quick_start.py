"""The quick start in small, through the command lines alone: prepare, train, kill, resume, evaluate, predict."""

import ast
import json
import math
import os
import re
import signal
import subprocess
import sys
import time
from pathlib import Path

import cv2
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor

from codetr_d2 import add_codetr_config

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
CONFIG = ROOT / "configs" / "quick_start" / "co_deformable_detr_efficientnet_lite0_digits.yaml"
NUM_ITERATIONS = 24
CHECKPOINT_PERIOD = 8
NUM_IMAGES = {"train": 40, "test": 8}


def run(*command) -> str:
    """Run a Python script from the project's folder; return what it printed."""
    result = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr


def first_test_picture(options: list[str]) -> Path:
    """The first picture of the test dataset."""
    triples = ast.literal_eval(options[options.index("DATASETS.COCO_JSON") + 1])
    return Path(triples[1][1]) / "0001.png"


@pytest.fixture(scope="module")
def options(tmp_path_factory) -> list[str]:
    """Config options of a run on a few images of the quick start's dataset, from the quick start's weights."""
    folder = tmp_path_factory.mktemp("datasets")
    run("tools/prepare/prepare_digits.py", "--output", folder / "digits")
    run("tools/prepare/prepare_efficientnet.py", "--output", folder / "weights.pth")
    triples = []
    for split, number in NUM_IMAGES.items():
        file = folder / "digits" / f"{split}.json"
        coco = json.loads(file.read_text())
        coco["images"] = coco["images"][:number]
        kept = {image["id"] for image in coco["images"]}
        coco["annotations"] = [x for x in coco["annotations"] if x["image_id"] in kept]
        file.write_text(json.dumps(coco))
        triples.append([f"few_digits_{split}", str(folder / "digits" / split), str(file)])
    return [
        *("MODEL.WEIGHTS", str(folder / "weights.pth")),
        *("MODEL.CODETR.INFERENCE_DTYPE", "float32"),  # on any machine, as the test itself computes
        *("DATASETS.COCO_JSON", repr(triples)),
        *("DATASETS.TRAIN", "['few_digits_train']"),
        *("DATASETS.TEST", "['few_digits_test']"),
        *("SOLVER.MAX_ITER", str(NUM_ITERATIONS)),
        *("SOLVER.CHECKPOINT_PERIOD", str(CHECKPOINT_PERIOD)),
        *("SOLVER.STEPS", f"[{NUM_ITERATIONS - 4}]"),
        *("SOLVER.WARMUP_ITERS", "4"),
        *("TEST.EVAL_PERIOD", str(NUM_ITERATIONS // 2)),
    ]


def train_command(options: list[str], output: Path) -> list[str]:
    return ["train_net.py", "--config-file", str(CONFIG), "--resume", *options, "OUTPUT_DIR", str(output)]


@pytest.fixture(scope="module")
def trained(options, tmp_path_factory) -> Path:
    """The output folder of a run that nothing disturbed."""
    output = tmp_path_factory.mktemp("trained")
    run(*train_command(options, output))
    return output


def read_metrics(output: Path) -> dict[int, dict]:
    """Iteration -> what metrics.json says of it."""
    metrics: dict[int, dict] = {}
    for line in (output / "metrics.json").read_text().splitlines():
        values = json.loads(line)
        metrics.setdefault(values["iteration"], {}).update(values)
    return metrics


def final(output: Path, name: str) -> float:
    """The last value of a metric."""
    metrics = read_metrics(output)
    return next(metrics[i][name] for i in sorted(metrics, reverse=True) if name in metrics[i])


def test_training_writes_finite_losses_and_the_average_precision(trained):
    metrics = read_metrics(trained)
    assert max(metrics) >= NUM_ITERATIONS - 1
    losses = {name: x for values in metrics.values() for name, x in values.items() if "loss" in name}
    assert all(math.isfinite(x) for x in losses.values())
    for name in ("loss_cls", "loss_box", "loss_giou", "loss_cls_aux_roi", "loss_giou_aux_atss", "total_loss"):
        assert name in losses
    assert 0 <= final(trained, "bbox/AP") <= 100
    for name in ("model_final.pth", "config.yaml", "log.txt", "last_checkpoint"):
        assert (trained / name).is_file()
    assert list(trained.glob("events.out.tfevents.*"))


def test_killed_training_resumes_and_ends_as_the_undisturbed_one(options, trained, tmp_path):
    command = [sys.executable, *train_command(options, tmp_path)]
    with open(tmp_path / "output.txt", "w") as file:
        process = subprocess.Popen(command, cwd=ROOT, stdout=file, stderr=subprocess.STDOUT, start_new_session=True)
        deadline = time.monotonic() + 240
        while not (tmp_path / "last_checkpoint").is_file():
            assert process.poll() is None and time.monotonic() < deadline, (tmp_path / "output.txt").read_text()
            time.sleep(0.05)
        time.sleep(1)  # into an iteration after the checkpoint
        assert process.poll() is None, "it ended before it could be killed"
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
    assert not (tmp_path / "model_final.pth").exists()

    assert f"Starting training from iteration {CHECKPOINT_PERIOD}" in run(*train_command(options, tmp_path))
    expected = torch.load(trained / "model_final.pth", weights_only=True)["model"]
    actual = torch.load(tmp_path / "model_final.pth", weights_only=True)["model"]
    assert actual.keys() == expected.keys()
    assert all(torch.equal(actual[name], expected[name]) for name in expected)
    for name in ("bbox/AP", "bbox/AP50"):
        assert final(tmp_path, name) == final(trained, name)


@pytest.mark.parametrize("num_processes", [1, 2])
def test_evaluation_alone_gives_the_average_precision_of_the_training(num_processes, trained, tmp_path):
    printed = run(
        *("train_net.py", "--config-file", trained / "config.yaml", "--eval-only", "--num-processes", num_processes),
        *("MODEL.WEIGHTS", trained / "model_final.pth", "OUTPUT_DIR", tmp_path),
    )
    header, _, row = re.search(r"(\| +AP +\|.*)\n(.*)\n(\|.*)", printed).groups()
    table = dict(zip([x.strip() for x in header.split("|")], [x.strip() for x in row.split("|")]))
    for name in ("AP", "AP50"):
        assert table[name] == f"{final(trained, f'bbox/{name}'):.3f}"
    assert json.loads((tmp_path / "inference" / "coco_instances_results.json").read_text())


def test_prediction_draws_and_lists_what_detectron2s_predictor_finds(options, trained, tmp_path):
    picture = first_test_picture(options)
    run(
        *("demo/predict.py", picture, "--config-file", trained / "config.yaml"),
        *("--output", tmp_path, "--score-threshold", 0.0),
    )
    (entry,) = json.loads((tmp_path / "detections.json").read_text())
    drawing = cv2.imread(str(tmp_path / "0001.png"))
    assert drawing.shape[0] == drawing.shape[1] >= entry["height"] == entry["width"] == 128

    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.merge_from_file(str(trained / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(trained / "model_final.pth")
    found = DefaultPredictor(cfg)(cv2.imread(str(picture)))["instances"]
    assert len(entry["detections"]) == len(found) > 0
    actual = torch.tensor([x["bbox"] for x in entry["detections"]])
    actual[:, 2:] += actual[:, :2]  # xywh -> xyxy
    torch.testing.assert_close(actual, found.pred_boxes.tensor, atol=1e-3, rtol=0)
    assert [x["category_id"] for x in entry["detections"]] == found.pred_classes.tolist()
    assert {x["category_name"] for x in entry["detections"]} <= set("0123456789")


def test_exported_files_find_the_same_and_take_the_weights_place(trained, tmp_path):
    detections = trained / "inference" / "coco_instances_results.json"
    expected = json.loads(detections.read_text())
    model = ["--config-file", trained / "config.yaml", "--weights", trained / "model_final.pth"]
    output = run("tools/export.py", *model, "--format", "openvino", "--int8", "--output", tmp_path)
    assert output.count("0 without their like") == 7 and "Traceback" not in output
    int8, float32 = tmp_path / "model_int8.xml", tmp_path / "model.xml"
    assert int8.with_suffix(".bin").stat().st_size < 0.6 * float32.with_suffix(".bin").stat().st_size
    assert not (tmp_path / "model.onnx").exists()

    evaluated = tmp_path / "evaluated"
    options = ["MODEL.WEIGHTS", float32, "OUTPUT_DIR", evaluated]
    run("train_net.py", "--config-file", trained / "config.yaml", "--eval-only", *options)
    assert json.loads(detections.read_text()) == expected  # of the run, whatever was evaluated for the export
    found = json.loads((evaluated / "inference" / detections.name).read_text())
    assert len(found) == len(expected) > 0
    for one, other in zip(found, expected):
        assert one["image_id"] == other["image_id"]
        assert one["score"] == pytest.approx(other["score"], abs=1e-4)


@pytest.mark.parametrize("document", ["README.md", "docs/predict.md"])
def test_python_in_the_documentation_runs(document, options, trained, tmp_path):
    (tmp_path / "output").mkdir()
    (tmp_path / "output" / "my_run").symlink_to(trained)
    cv2.imwrite(str(tmp_path / "picture.jpg"), cv2.imread(str(first_test_picture(options))))
    (code,) = re.findall(r"```python\n(.*?)```", (ROOT / document).read_text(), re.DOTALL)
    result = subprocess.run([sys.executable, "-c", code], cwd=tmp_path, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
    assert result.stdout or (tmp_path / "drawn.png").is_file()


def test_command_lines_name_what_is_missing(tmp_path):
    command = [sys.executable, "train_net.py", "--config-file", str(tmp_path / "absent.yaml")]
    result = subprocess.run(command, cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 2
    assert "absent.yaml" in result.stderr and "Traceback" not in result.stderr
