"""APs of branches: what is detected without NMS, and what counts."""

import csv
import json

import pytest
import torch
from detectron2.layers import batched_nms
from detectron2.structures import Boxes, Instances
from torch import nn

from codetr_d2.analysis import branches
from codetr_d2.analysis.branches import DETECTOR, branch_detections, head_without_nms, measure_branches
from codetr_d2.analysis.models import load_model
from codetr_d2.modeling.auxiliary import AUX_HEAD_REGISTRY
from tests.small_model import build, make_batch
from tests.tiny_detector import write_dataset
from tests.tiny_run import write_tiny_run

HEADS = sorted(name for name, _ in AUX_HEAD_REGISTRY)


@pytest.fixture
def model():
    return build(aux_heads=HEADS).eval()


@pytest.mark.parametrize("name", HEADS)
def test_nms_on_what_is_found_without_it_gives_what_is_found_with_it(model, name):
    head = model.auxiliary_heads[name]
    if name == "roi":
        owner, threshold = head.roi_heads.box_predictor, "test_nms_thresh"
        owner.test_topk_per_image, owner.test_score_thresh = 10**6, 0.0  # NMS would choose from fewer
    else:
        owner, threshold = head, "nms_thresh"
        head.nms_thresh = 0.3
    with torch.no_grad():
        for x in head.parameters():  # boxes of a head that has learnt nothing hardly overlap
            x.add_(torch.randn(x.shape) * 0.1)
        head.detections_per_image, head.score_thresh = 10**6, 0.0
        head.score_voting = False  # PAA's moves the boxes
    with torch.no_grad():
        pyramid = model.auxiliary_pyramid(model.encode(model.features(model.preprocess(make_batch(1)))))
        with_nms, without = head.inference(pyramid)[0], head_without_nms(head).inference(pyramid)[0]
    kept = batched_nms(without.pred_boxes.tensor, without.scores, without.pred_classes, getattr(owner, threshold))
    assert len(without) > len(kept) == len(with_nms) > 0
    torch.testing.assert_close(without[kept].scores, with_nms.scores)
    order = [x.pred_boxes.tensor.sum(1).sort().indices for x in (without[kept], with_nms)]  # some scores are equal
    for x, y in zip(*(x.pred_boxes.tensor[i].unbind(1) for x, i in zip((without[kept], with_nms), order))):
        torch.testing.assert_close(x, y)
    assert getattr(owner, threshold) < 1  # of the model nothing has changed


def test_a_head_of_other_code_has_no_row_without_nms(model):
    assert head_without_nms(nn.Identity()) is None
    found = branch_detections(model, make_batch(1)[0], {})
    assert set(found) == {(DETECTOR, False), (DETECTOR, True)} | {(name, True) for name in HEADS}


def test_the_detector_without_nms_is_the_model_itself(model):
    x = make_batch(1)[0]
    found = branch_detections(model, x, {})
    with torch.no_grad():
        expected = model([x])[0]["instances"]
    assert torch.equal(found[DETECTOR, False].scores, expected.scores)
    assert torch.equal(found[DETECTOR, False].pred_boxes.tensor, expected.pred_boxes.tensor)
    nms = found[DETECTOR, True]
    assert 0 < len(batched_nms(nms.pred_boxes.tensor, nms.scores, nms.pred_classes, 0.7)) == len(nms)


def test_the_detector_of_co_dino_with_nms_is_the_model_itself():
    model = build("MODEL.CODETR.QUERY_HEAD", "CoDINOHead", "MODEL.CODETR.SOFT_NMS_THRESH", 0.5).eval()
    x = make_batch(1)[0]
    with torch.no_grad():
        expected = model([x])[0]["instances"]
    found = branch_detections(model, x, {})
    assert torch.equal(found[DETECTOR, True].scores, expected.scores)
    assert not torch.equal(found[DETECTOR, False].scores, expected.scores)


def test_only_the_images_that_were_seen_count(tmp_path, monkeypatch):
    """A branch that finds everything on the first two of six images, and one that finds everything elsewhere."""
    datasets = [write_dataset(tmp_path, name, 6, 0) for name in ("branches_train", "branches_test")]
    write_tiny_run(
        tmp_path / "run",
        datasets,
        (
            "MODEL.CODETR.AUX_HEADS",
            ["atss"],
            "MODEL.DEVICE",
            "cpu",
            "MODEL.CODETR.NUM_CLASSES",
            3,
            "MODEL.CODETR.CLASS_NAMES",
            [],
        ),
    )

    def find(model, x, without_nms):
        truth = x["instances"]
        scale = x["width"] / truth.image_size[1]
        boxes = truth.gt_boxes.tensor * scale
        fields = {"scores": torch.ones(len(truth)), "pred_classes": truth.gt_classes}
        size = (x["height"], x["width"])
        right = Instances(size, pred_boxes=Boxes(boxes), **fields)
        wrong = Instances(size, pred_boxes=Boxes(boxes * 0.01), **fields)
        return {(DETECTOR, False): wrong, (DETECTOR, True): right, ("atss", True): right}

    monkeypatch.setattr(branches, "branch_detections", find)
    model = load_model("tiny", str(tmp_path / "run" / "config.yaml"), str(tmp_path / "run" / "model_final.pth"))
    rows = measure_branches([model], 2, tmp_path)
    assert rows == [
        {"model": "tiny", "branch": "detector", "AP_without_NMS": 0.0, "AP_with_NMS": 100.0, "images": 2},
        {"model": "tiny", "branch": "atss", "AP_without_NMS": None, "AP_with_NMS": 100.0, "images": 2},
    ]
    assert json.loads((tmp_path / "branches.json").read_text()) == rows
    with open(tmp_path / "branches.csv") as file:
        assert [row["AP_without_NMS"] for row in csv.DictReader(file)] == ["0.0", ""]
    assert (tmp_path / "branches.png").exists()
