"""The options of the RetinaNet head and its limits; tests/reference has its numbers."""

import math

import pytest
import torch
from torchvision.ops import box_iou

from codetr_d2.errors import InputError
from codetr_d2.modeling.auxiliary import RetinaNetHead, build_auxiliary_head
from codetr_d2.modeling.auxiliary.dense import BACKGROUND, IGNORED

SIZES = [(96, 128), (80, 90)]


def test_published_options(cfg, input_shapes):
    head = build_auxiliary_head("retinanet", cfg, input_shapes)
    assert isinstance(head, RetinaNetHead) and len(head.cls_tower) == len(head.box_tower) == 1
    assert head.loss_weights == {"loss_cls": 1.0, "loss_box": 2.0}
    assert (head.score_thresh, head.pre_nms_topk, head.nms_thresh, head.soft_nms) == (0.05, 1000, 0.5, False)
    assert head.cls_score.weight.std().item() == pytest.approx(0.01, rel=0.05)


def test_options(cfg, input_shapes):
    """Every option that is not refused reaches the head."""
    options = {"NUM_CONVS": 3, "ANCHOR_SCALE": 6.0, "BBOX_REG_WEIGHTS": (1.0, 2.0, 3.0, 4.0)}
    options |= {"IOU_THRESHOLDS": [0.2, 0.3, 0.6], "IOU_LABELS": [0, 1, -1, 1], "LOSS_CLS": 0.1, "LOSS_BOX": 0.2}
    options |= {"TOPK_CANDIDATES_TEST": 50, "SCORE_THRESH_TEST": 0.2, "NMS_THRESH_TEST": 0.4, "SOFT_NMS": True}
    refused = {"NUM_CLASSES", "IN_FEATURES", "PRIOR_PROB", "FOCAL_LOSS_GAMMA", "FOCAL_LOSS_ALPHA", "NORM"}
    refused |= {"SMOOTH_L1_LOSS_BETA", "BBOX_REG_LOSS_TYPE"}
    assert options.keys() == cfg.MODEL.RETINANET.keys() - refused
    cfg.MODEL.RETINANET.update(options)
    head = build_auxiliary_head("retinanet", cfg, input_shapes)
    assert len(head.cls_tower) == len(head.box_tower) == 3
    widths = next(iter(head.anchor_generator.cell_anchors))[3:6, 2] * 2  # the square ones
    torch.testing.assert_close(widths, torch.tensor([48.0, 48 * 2 ** (1 / 3), 48 * 2 ** (2 / 3)]))
    assert head.box2box_transform.weights == (1.0, 2.0, 3.0, 4.0)
    assert head.loss_weights == {"loss_cls": 0.1, "loss_box": 0.2}
    assert (head.score_thresh, head.pre_nms_topk, head.nms_thresh, head.soft_nms) == (0.2, 50, 0.4, True)

    box = torch.tensor([[0.0, 0, 10, 10]])
    anchors = torch.tensor([[0.0, 0, 10, w] for w in (1, 2.5, 5, 10, 1)])  # IoU 0.1, 0.25, 0.5, 1
    assert head.assign(anchors, [5], box).tolist() == [BACKGROUND, 0, IGNORED, 0, BACKGROUND]


@pytest.mark.parametrize(
    "key, value",
    [
        ("NUM_CONVS", -1),
        ("ANCHOR_SCALE", 0.0),
        ("LOSS_BOX", -1.0),
        ("TOPK_CANDIDATES_TEST", 0),
        ("SCORE_THRESH_TEST", 1.5),
        ("NMS_THRESH_TEST", -0.1),
        ("IOU_THRESHOLDS", []),
        ("IOU_THRESHOLDS", [0.5, 0.4]),
        ("IOU_THRESHOLDS", [0.0, 0.4]),
        ("IOU_LABELS", [0, 1]),
        ("IOU_LABELS", [0, 2, 1]),
        ("BBOX_REG_WEIGHTS", (1.0, 1.0)),
        ("BBOX_REG_WEIGHTS", (1.0, 1.0, 0.0, 1.0)),
    ],
)
def test_wrong_options_are_named(cfg, key, value):
    RetinaNetHead.check_options(cfg)
    cfg.MODEL.RETINANET[key] = value
    with pytest.raises(InputError, match=rf"MODEL\.RETINANET\.{key} is .*; it must ") as error:
        RetinaNetHead.check_options(cfg)
    assert "\n" not in str(error.value)


def test_sides_change_by_a_limited_factor(cfg, input_shapes):
    cfg.MODEL.RETINANET.BBOX_REG_WEIGHTS = (1.0, 1.0, 2.0, 4.0)
    head = build_auxiliary_head("retinanet", cfg, input_shapes)
    anchors = torch.tensor([[10.0, 20, 30, 60]]).expand(3, -1)
    deltas = torch.tensor([[0.0, 0, -99, -99], [0, 0, 99, 99], [0.5, 0, 2 * math.log(2), 4 * math.log(3)]])
    boxes = head.decode(deltas, anchors)
    limit = 1000 / 16
    sides = torch.tensor([[20 / limit, 40 / limit], [20 * limit, 40 * limit], [40.0, 120.0]])
    torch.testing.assert_close(boxes[:, 2:] - boxes[:, :2], sides, rtol=1e-4, atol=1e-4)
    torch.testing.assert_close((boxes[:, :2] + boxes[:, 2:]) / 2, torch.tensor([[20.0, 40], [20, 40], [30, 40]]))


def test_an_object_that_no_anchor_reaches_has_none(cfg, input_shapes, make_pyramid, make_targets):
    """Its largest IoU is 0, which it shares with nearly all anchors."""
    head = build_auxiliary_head("retinanet", cfg, input_shapes)
    boxes = [[10, 10, 60, 70], [50, 50, 50, 50], [9000, 9000, 9100, 9100]]
    targets = [make_targets(SIZES[0], boxes, [2, 0, 1]), make_targets(SIZES[1], [[5, 5, 50, 60]], [1])]
    losses, samples = head(make_pyramid(SIZES), targets)
    assert set(samples.labels[0].tolist()) == {2, 3} and set(samples.labels[1].tolist()) == {1, 3}
    assert all(loss.isfinite() for loss in losses.values())


@pytest.mark.slow
def test_learns_a_few_objects(cfg, input_shapes, make_pyramid, make_targets):
    """Overfitted to a random pyramid, the head detects its objects."""
    torch.manual_seed(0)
    head = build_auxiliary_head("retinanet", cfg, input_shapes)
    pyramid = make_pyramid(SIZES)
    targets = [
        make_targets(SIZES[0], [[10, 10, 60, 70], [50, 20, 120, 90]], [2, 0]),
        make_targets(SIZES[1], [[5, 5, 50, 60]], [1]),
    ]
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    for _ in range(100):
        optimizer.zero_grad()
        sum(head(pyramid, targets)[0].values()).backward()
        optimizer.step()
    for target, found in zip(targets, head.eval().inference(pyramid), strict=True):
        found = found[: len(target)]
        ious = box_iou(target.gt_boxes.tensor, found.pred_boxes.tensor)
        assert ious.amax(1).min() > 0.6
        assert torch.equal(found.pred_classes[ious.argmax(1)], target.gt_classes)
