"""Masks of images that lie on a canvas, whose padding detections may reach into."""

import pytest
import torch
from detectron2.structures import Boxes, Instances

from tests.small_model import build, make_batch

IMAGE, CANVAS, EDGE = (96, 128), 160, 100
BOXES = [[20.0, 10, 60, 50], [60, 40, 150, 150], [90, 30, 128, 90], [130, 0, 160, 90], [0, 96, 60, 160]]
INSIDE = [[20, 10, 60, 50], [60, 40, 128, 96], [90, 30, 128, 90]]  # the last two lie in the padding


def masks_left_of_the_edge(_, detections):
    """As a mask head does: [N, 1, 112, 112] probabilities inside each box, here 1 where a pixel's x is below EDGE."""
    for found in detections:
        x0, _, x1, _ = found.pred_boxes.tensor[:, :, None, None].unbind(1)
        x = x0 + (torch.arange(112) + 0.5) / 112 * (x1 - x0)
        found.pred_masks = (x < EDGE).float()[:, :, None].expand(-1, 1, 112, -1)
    return detections


@pytest.mark.parametrize("mask_head", ["roi", "refine"])
@pytest.mark.parametrize("eval_head", ["detr", "roi", "atss"])
@torch.no_grad()
@pytest.mark.slow
def test_masks_are_not_squeezed_at_the_border(monkeypatch, mask_head, eval_head):
    """A mask whose right side is a vertical line in the image stays so, wherever its box has been clipped."""
    options = ("MODEL.CODETR.EVAL_HEAD", eval_head, "MODEL.CODETR.CANVAS_SIZE", CANVAS)
    model = build("MODEL.MASK_ON", True, "MODEL.CODETR.MASK_HEAD", mask_head, *options).eval()
    roi_heads = model.auxiliary_heads["roi"].roi_heads

    def found(*_):
        boxes, n = Boxes(torch.tensor(BOXES)), len(BOXES)
        fields = {"scores": torch.linspace(0.9, 0.5, n), "pred_classes": torch.zeros(n, dtype=torch.int64)}
        return [Instances((CANVAS, CANVAS), pred_boxes=boxes, **fields)]

    monkeypatch.setattr(model.query_head, "finish", found)
    monkeypatch.setattr(model.auxiliary_heads["atss"], "inference", found)
    monkeypatch.setattr(roi_heads, "_forward_box", found)
    if mask_head == "roi":
        monkeypatch.setattr(roi_heads, "_forward_mask", masks_left_of_the_edge)
    else:
        monkeypatch.setattr(model.mask_head, "inference", masks_left_of_the_edge)
    [sample] = make_batch(1)
    [result] = model([{"image": sample["image"], "height": 2 * IMAGE[0], "width": 2 * IMAGE[1]}])
    result = result["instances"]
    assert result.pred_boxes.tensor.tolist() == [[2 * v for v in box] for box in INSIDE]
    expected = torch.zeros(len(INSIDE), 2 * IMAGE[0], 2 * IMAGE[1], dtype=torch.bool)
    for mask, (x0, y0, x1, y1) in zip(expected, INSIDE):
        mask[2 * y0 : 2 * y1, 2 * x0 : 2 * min(x1, EDGE)] = True
    differs = (result.pred_masks != expected).any(1)  # in which columns
    columns = torch.arange(2 * IMAGE[1])
    assert not differs[:, (columns - 2 * EDGE).abs() > 2].any()  # pasting rounds by a pixel or two


@pytest.mark.parametrize("mask_head", ["roi", "refine"])
@torch.no_grad()
def test_masks_are_predicted_for_the_box_inside_the_image(monkeypatch, mask_head):
    """Those of the real mask heads, for a box that reaches into the padding and for the part of it that does not."""
    options = ("MODEL.MASK_ON", True, "MODEL.CODETR.MASK_HEAD", mask_head, "MODEL.CODETR.CANVAS_SIZE", CANVAS)
    model = build(*options).eval()
    [sample] = make_batch(1)
    results = []
    for boxes in (BOXES[:3], INSIDE):
        fields = {"scores": torch.tensor([0.9, 0.8, 0.7]), "pred_classes": torch.arange(3)}
        found = Instances((CANVAS, CANVAS), pred_boxes=Boxes(torch.tensor(boxes).float()), **fields)
        monkeypatch.setattr(model.query_head, "finish", lambda *_, found=found: [found])
        results.append(model([{"image": sample["image"], "height": 300, "width": 400}])[0]["instances"])
    assert torch.equal(results[0].pred_masks, results[1].pred_masks) and results[0].pred_masks.flatten(1).any(1).all()
    assert torch.equal(results[0].pred_boxes.tensor, results[1].pred_boxes.tensor)


@pytest.mark.parametrize("mask_head", ["roi", "refine"])
@torch.no_grad()
def test_no_detection_inside_the_image(monkeypatch, mask_head):
    options = ("MODEL.MASK_ON", True, "MODEL.CODETR.MASK_HEAD", mask_head, "MODEL.CODETR.CANVAS_SIZE", CANVAS)
    model = build(*options).eval()
    fields = {"scores": torch.tensor([0.5]), "pred_classes": torch.tensor([0])}
    found = Instances((CANVAS, CANVAS), pred_boxes=Boxes(torch.tensor(BOXES[-1:])), **fields)
    monkeypatch.setattr(model.query_head, "finish", lambda *_: [found])
    [result] = model([{"image": make_batch(1)[0]["image"]}])
    assert result["instances"].pred_masks.shape == (0, *IMAGE)
