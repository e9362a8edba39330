"""A published checkpoint through the command lines: evaluated as it is, converted once, and converted back."""

import ast
import json
import subprocess
import sys
from collections import OrderedDict
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model

from codetr_d2 import add_codetr_config
from codetr_d2.checkpoint.published import published_to_codetr
from codetr_d2.inference import Predictor
from tests.reference.recordings import DEFAULT_DIR, draw_parameter, parameter_shapes

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
NAME = "co_dino_5scale_r50_1x_coco"
CONFIG = ROOT / "configs" / "co_dino" / f"{NAME}.yaml"
SIZE = ["INPUT.MIN_SIZE_TEST", "160", "INPUT.MAX_SIZE_TEST", "200", "MODEL.DEVICE", "cpu"]
SIZE += ["MODEL.CODETR.INFERENCE_DTYPE", "float32"]  # on any machine, as the test itself computes


class HistoryBuffer:
    """Stands for an object of another framework, such as published files hold beside the weights."""


def run(*command) -> str:
    result = subprocess.run([sys.executable, *map(str, command)], cwd=ROOT, capture_output=True, text=True)
    assert result.returncode == 0, f"{command}\n{result.stdout}\n{result.stderr}"
    return result.stdout + result.stderr


@pytest.fixture(scope="module")
def published(tmp_path_factory) -> Path:
    """A file of the published layout: the names and shapes of the published model, and drawn values."""
    shapes = parameter_shapes(DEFAULT_DIR, NAME)
    weights = OrderedDict((name, draw_parameter(name, shape, "g")) for name, shape in shapes.items())
    path = tmp_path_factory.mktemp("published") / f"{NAME}.pth"
    meta = {"epoch": 12, "mmdet_version": "2.25.3", "loss": np.float64(0.5), "hook": HistoryBuffer()}
    torch.save({"meta": meta, "state_dict": weights, "optimizer": {"state": {}, "param_groups": []}}, path)
    return path


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> list[str]:
    """Options that name two random pictures with COCO's number of classes."""
    folder = tmp_path_factory.mktemp("pictures")
    rng = np.random.default_rng(0)
    images, annotations = [], []
    for i, (height, width) in enumerate([(120, 150), (110, 90)], start=1):
        coarse = rng.integers(0, 256, (height // 10, width // 10, 3), dtype=np.uint8)
        cv2.imwrite(str(folder / f"{i}.png"), cv2.resize(coarse, (width, height), interpolation=cv2.INTER_NEAREST))
        images.append({"id": i, "file_name": f"{i}.png", "width": width, "height": height})
        annotations.append({"id": i, "image_id": i, "category_id": i, "bbox": [10, 10, 40, 50]})
    coco = {"images": images, "annotations": annotations}
    coco["categories"] = [{"id": i, "name": f"class {i}"} for i in range(1, 81)]
    (folder / "coco.json").write_text(json.dumps(coco))
    triple = repr([["two_pictures", str(folder), str(folder / "coco.json")]])
    return ["DATASETS.COCO_JSON", triple, "DATASETS.TEST", "['two_pictures']"]


def predict(cfg, weights: dict | str, files: list[str]) -> list:
    """What detectron2's predictor finds with weights by our names, or with those of a file."""
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = weights if isinstance(weights, str) else ""
    predictor = DefaultPredictor(cfg)
    if not isinstance(weights, str):
        predictor.model.load_state_dict(weights)
    return [predictor(cv2.imread(file))["instances"] for file in files]


def test_published_file_gives_its_detections_converted_or_not(published, dataset, tmp_path):
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.merge_from_file(str(CONFIG))
    cfg.merge_from_list(SIZE)
    weights, _ = published_to_codetr(torch.load(published, weights_only=False)["state_dict"])
    build_model(cfg).load_state_dict(weights)  # every tensor of the model comes from the file
    folder = Path(ast.literal_eval(dataset[1])[0][1])
    files = [str(folder / "1.png"), str(folder / "2.png")]
    expected = predict(cfg, weights, files)

    log = run(
        *("train_net.py", "--eval-only", "--config-file", CONFIG, *SIZE, *dataset),
        *("MODEL.WEIGHTS", published, "OUTPUT_DIR", tmp_path / "evaluated"),
    )
    assert "53 (a counter of batch norm" in log and "meta.hook" in log and "optimizer" in log
    found = json.loads((tmp_path / "evaluated" / "inference" / "coco_instances_results.json").read_text())
    for i, instances in enumerate(expected, start=1):
        rows = [x for x in found if x["image_id"] == i]
        assert len(rows) == len(instances) == 300
        scores = torch.tensor([x["score"] for x in rows])
        torch.testing.assert_close(scores, instances.scores, rtol=0, atol=1e-5)
        boxes = torch.tensor([x["bbox"] for x in rows])
        boxes[:, 2:] += boxes[:, :2]
        apart = scores.diff().abs().min(dim=0).values > 1e-6  # neighbours of equal score may change places
        close = (boxes - instances.pred_boxes.tensor).abs().amax(1) < 1e-2
        assert close.all() if apart else close.float().mean() > 0.9

    converted, back = tmp_path / "converted.pth", tmp_path / "back.pth"
    run("tools/convert_checkpoint.py", published, converted)
    cfg.MODEL.WEIGHTS = str(published)
    as_downloaded = Predictor(cfg)
    for file, ours, instances in zip(files, predict(cfg, str(converted), files), expected):
        torch.testing.assert_close(ours.scores, instances.scores, rtol=0, atol=1e-5)
        scores = as_downloaded(cv2.imread(file))["instances"].scores
        torch.testing.assert_close(scores, instances.scores, rtol=0, atol=1e-5)
    run("tools/convert_checkpoint.py", "--to-published", converted, back)
    before, after = (torch.load(x, weights_only=False) for x in (published, back))
    assert list(before) == list(after) and list(before["state_dict"]) == list(after["state_dict"])
    assert all(torch.equal(x, after["state_dict"][name]) for name, x in before["state_dict"].items())
    assert after["meta"] == {"epoch": 12, "mmdet_version": "2.25.3", "loss": 0.5}
    assert after["optimizer"] == before["optimizer"]
