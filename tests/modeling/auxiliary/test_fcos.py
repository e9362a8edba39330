"""The options of the FCOS head and what it does with padding; tests/reference has its numbers."""

import math

import pytest
import torch
from torchvision.ops import box_iou

from codetr_d2.errors import InputError
from codetr_d2.modeling.auxiliary import FCOSHead, build_auxiliary_head

SIZES = [(96, 128), (80, 90)]


@pytest.fixture
def targets(make_targets):
    return [
        make_targets(SIZES[0], [[10, 10, 60, 70], [50, 20, 120, 90]], [2, 0]),
        make_targets(SIZES[1], [[5, 5, 50, 60]], [1]),
    ]


def test_published_options(cfg, input_shapes):
    head = build_auxiliary_head("fcos", cfg, input_shapes)
    assert isinstance(head, FCOSHead) and len(head.cls_tower) == len(head.box_tower) == 1
    assert head.loss_weights == {"loss_cls": 1.0, "loss_box": 1.0, "loss_centerness": 1.0}
    assert (head.score_thresh, head.pre_nms_topk, head.nms_thresh, head.soft_nms) == (0.05, 1000, 0.6, False)
    assert [x.item() for x in head.scales] == [1.0] * 5


def test_options(cfg, input_shapes):
    """Every option of the config reaches the head."""
    options = {"NUM_CONVS": 3, "CENTER_SAMPLING_RADIUS": 0.6, "SCORE_THRESH_TEST": 0.2}
    options |= {"LOSS_CLS": 0.1, "LOSS_BOX": 0.2, "LOSS_CENTERNESS": 0.3}
    options |= {"PRE_NMS_TOPK_TEST": 50, "NMS_THRESH_TEST": 0.4, "SOFT_NMS": True}
    assert set(options) == set(cfg.MODEL.FCOS)
    cfg.MODEL.FCOS.update(options)
    head = build_auxiliary_head("fcos", cfg, input_shapes)
    assert len(head.cls_tower) == len(head.box_tower) == 3
    assert head.loss_weights == {"loss_cls": 0.1, "loss_box": 0.2, "loss_centerness": 0.3}
    assert (head.score_thresh, head.pre_nms_topk, head.nms_thresh, head.soft_nms) == (0.2, 50, 0.4, True)
    # Points at 4 and 12: with 0.6 strides, 4.8 pixels, both are near 8, and only the latter is near 9.
    anchors = torch.tensor([[x - 32, -28, x + 32, 36] for x in (4.0, 12.0)])
    counts = [2, 0, 0, 0, 0]
    assert head.assign(anchors, counts, torch.tensor([[0.0, 0, 16, 8]])).tolist() == [0, 0]
    assert head.assign(anchors, counts, torch.tensor([[0.0, 0, 18, 8]])).tolist() == [-1, 0]


@pytest.mark.parametrize(
    "key, value",
    [
        ("NUM_CONVS", -1),
        ("CENTER_SAMPLING_RADIUS", 0.0),
        ("LOSS_CENTERNESS", -1.0),
        ("PRE_NMS_TOPK_TEST", 0),
        ("SCORE_THRESH_TEST", 1.5),
        ("NMS_THRESH_TEST", -0.1),
    ],
)
def test_wrong_options_are_named(cfg, key, value):
    FCOSHead.check_options(cfg)
    cfg.MODEL.FCOS[key] = value
    with pytest.raises(InputError, match=rf"MODEL\.FCOS\.{key} is .*; it must be"):
        FCOSHead.check_options(cfg)


def test_candidates_are_boxes_around_all_points(cfg, input_shapes, make_pyramid, targets):
    """Of 8 strides, in the padding too."""
    pyramid = make_pyramid(SIZES)
    _, samples = build_auxiliary_head("fcos", cfg, input_shapes)(pyramid, targets)
    expected = [
        [stride * (c + 0.5) + side * 4 * stride for side in (-1, 1) for c in (x, y)]
        for stride, (height, width) in zip(pyramid.geometry.strides, pyramid.geometry.shapes)
        for y in range(height)
        for x in range(width)
    ]
    for i in range(2):
        assert samples.boxes[i].tolist() == expected
        assert torch.equal(samples.features[i], pyramid.tokens[i])


def test_points_in_the_padding_are_trained_as_background(cfg, input_shapes, make_pyramid, targets):
    """The classification loss falls with the scores there."""
    pyramid = make_pyramid(SIZES)
    head = build_auxiliary_head("fcos", cfg, input_shapes)
    logits, *others = (torch.cat(x, dim=1) for x in zip(*head.predict(pyramid.maps())))
    levels = head.anchor_generator(pyramid.maps())
    dense_targets = head.targets(pyramid.geometry, levels, [logits, *others], targets)
    logits = logits.detach().requires_grad_()
    head.losses([logits, *others], dense_targets)["loss_cls"].backward()
    padding = pyramid.geometry.padding_mask
    assert padding.any() and (logits.grad[padding] > 0).all()


def test_no_distance_is_negative(cfg, input_shapes):
    head = build_auxiliary_head("fcos", cfg, input_shapes)
    anchors = torch.tensor([[-28.0, -28, 36, 36], [-56, -56, 72, 72]])  # around (4, 4) and (8, 8)
    boxes = head.decode(torch.tensor([[1.0, 2, 3, 4], [-1, 0, 0.5, -3]]), anchors)
    assert boxes.tolist() == [[-4, -12, 28, 36], [8, 8, 16, 8]]


def test_inference_ranks_by_class_and_centerness(cfg, input_shapes, make_pyramid):
    """The threshold is for the class probability alone."""
    head = build_auxiliary_head("fcos", cfg, input_shapes).eval()
    with torch.no_grad():
        head.cls_score.bias.fill_(math.log(0.1 / 0.9))
        head.centerness.bias.fill_(-3.0)
        head.box_distances.bias.fill_(0.1)
    for found in head.inference(make_pyramid(SIZES)):
        assert len(found) == 100 and (found.scores.diff() <= 0).all()
        assert (found.scores < 0.02).all()  # 0.1 times 0.05


@pytest.mark.slow
def test_learns_a_few_objects(cfg, input_shapes, make_pyramid, targets):
    """Overfitted to a random pyramid, the head detects its objects."""
    torch.manual_seed(0)
    head = build_auxiliary_head("fcos", cfg, input_shapes)
    pyramid = make_pyramid(SIZES)
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    for _ in range(150):
        optimizer.zero_grad()
        sum(head(pyramid, targets)[0].values()).backward()
        optimizer.step()
    for target, found in zip(targets, head.eval().inference(pyramid), strict=True):
        found = found[: len(target)]
        ious = box_iou(target.gt_boxes.tensor, found.pred_boxes.tensor)
        assert ious.amax(1).min() > 0.6
        assert torch.equal(found.pred_classes[ious.argmax(1)], target.gt_classes)
