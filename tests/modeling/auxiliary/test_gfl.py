"""The GFL head, beside the recordings in tests/reference and the contract of all heads."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import box_iou, generalized_box_iou_loss

from codetr_d2.modeling.auxiliary import GFLHead, build_auxiliary_head

SIZES = [(96, 128), (80, 90)]


@pytest.fixture
def head(cfg, input_shapes):
    head = build_auxiliary_head("gfl", cfg, input_shapes)
    assert isinstance(head, GFLHead)
    return head


@pytest.fixture
def targets(make_targets):
    return [
        make_targets(SIZES[0], [[10, 10, 60, 70], [50, 20, 120, 90]], [2, 0]),
        make_targets(SIZES[1], [[5, 5, 50, 60]], [1]),
    ]


def test_sides_are_means_of_distributions(cfg, input_shapes):
    """In strides, from the centre of the anchor."""
    cfg.MODEL.GFL.REG_MAX, cfg.MODEL.GFL.ANCHOR_SCALE = 4, 6.0
    head = build_auxiliary_head("gfl", cfg, input_shapes)
    p = torch.tensor([[0.5, 0.5, 0, 0, 0], [0, 0, 1, 0, 0], [0, 0, 0, 0.25, 0.75], [0.2, 0.2, 0.2, 0.2, 0.2]])
    anchors = torch.tensor([[16.0, 0, 64, 48], [0, 0, 96, 96]])  # strides of 8 and 16, centres (40, 24) and (48, 48)
    boxes = head.decode(p.log().clamp(min=-100).flatten().expand(2, -1), anchors)
    expected = [[40 - 0.5 * 8, 24 - 2 * 8, 40 + 3.75 * 8, 24 + 2 * 8], [48 - 8, 48 - 32, 48 + 60, 48 + 32]]
    torch.testing.assert_close(boxes, torch.tensor(expected))


def test_losses(head, make_pyramid, targets):
    """Computed again from raw predictions, one anchor at a time."""
    pyramid = make_pyramid(SIZES)
    with torch.no_grad():
        head.cls_score.weight.mul_(30)
        head.box_sides.weight.mul_(30)
        for i, scale in enumerate(head.scales):
            scale.fill_(1 + 0.1 * i)
    losses, samples = head(pyramid, targets)
    predictions = [torch.cat(x, dim=1) for x in zip(*head.predict(pyramid.maps()))]
    num_positive, cls, box, dfl, sum_of_weights = 0, 0, 0, 0, 0
    for i in range(len(SIZES)):
        logits, sides = (x[i] for x in predictions)
        labels, valid = samples.labels[i], (samples.boxes[i] != 0).any(1)
        quality = torch.zeros_like(logits)
        for j in (labels < 3).nonzero().squeeze(1).tolist():
            x1, y1, x2, y2 = samples.boxes[i][j].tolist()
            cx, cy, stride, gt = (x1 + x2) / 2, (y1 + y2) / 2, (x2 - x1) / 8, samples.target_boxes[i][j]
            logs = sides[j].view(4, 17).log_softmax(1)
            left, top, right, bottom = (logs.exp() @ torch.arange(17.0)) * stride
            predicted = torch.stack((cx - left, cy - top, cx + right, cy + bottom))
            quality[j, labels[j]] = box_iou(predicted[None], gt[None]).item()
            weight = logits[j].max().sigmoid().item()
            box += weight * generalized_box_iou_loss(predicted, gt)
            for side, d in enumerate([cx - gt[0], cy - gt[1], gt[2] - cx, gt[3] - cy]):
                d = min(max(d.item() / stride, 0), 15.9)
                for whole in range(17):  # each number's share falls from 1 to 0 in a distance of 1
                    dfl -= weight * max(0, 1 - abs(d - whole)) * logs[side, whole] / 4
            sum_of_weights += weight
            num_positive += 1
        p = logits.sigmoid()
        losses_cls = F.binary_cross_entropy(p, quality, reduction="none") * (quality - p) ** 2
        cls += losses_cls[valid].sum()
    torch.testing.assert_close(losses["loss_cls"], cls / num_positive)
    torch.testing.assert_close(losses["loss_box"], 2 * box / max(sum_of_weights, 1))
    torch.testing.assert_close(losses["loss_dfl"], 0.25 * dfl / max(sum_of_weights, 1))


def test_every_loss_is_divided_by_a_mean_over_the_processes(head, make_pyramid, targets, other_process):
    with torch.no_grad():
        head.cls_score.bias.fill_(2.0)  # enough probability that the sum of the weights counts
    alone, _ = head(make_pyramid(SIZES), targets)
    other_process(3)  # three times as many positives: twice as many on average
    for name, loss in head(make_pyramid(SIZES), targets)[0].items():
        torch.testing.assert_close(loss, alone[name] / 2)


def test_autocast_rounds_no_box(head, make_pyramid, targets):
    """Losses and boxes of the same predictions are those of float32."""
    predictions = [torch.cat(x, dim=1) for x in zip(*head.predict(make_pyramid(SIZES).maps()))]
    anchors = torch.cat([x.tensor for x in head.anchor_generator(make_pyramid(SIZES).maps())])
    expected = head.decode(predictions[1][0], anchors)
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.decode(predictions[1][0], anchors), expected)


def test_options(cfg, input_shapes):
    """Every option of the config reaches the head."""
    options = {"NUM_CONVS": 3, "ANCHOR_SCALE": 6.0, "TOPK": 5, "REG_MAX": 7}
    options |= {"LOSS_CLS": 0.1, "LOSS_BOX": 0.2, "LOSS_DFL": 0.3}
    options |= {"SCORE_THRESH_TEST": 0.1, "PRE_NMS_TOPK_TEST": 50, "NMS_THRESH_TEST": 0.4, "SOFT_NMS": True}
    assert set(options) == set(cfg.MODEL.GFL)
    cfg.MODEL.GFL.update(options)
    cfg.TEST.DETECTIONS_PER_IMAGE = 33
    head = build_auxiliary_head("gfl", cfg, input_shapes)
    assert len(head.cls_tower) == len(head.box_tower) == 3
    assert [x.tolist() for x in head.anchor_generator.cell_anchors] == [
        [[-3 * s, -3 * s, 3 * s, 3 * s]] for s in (8, 16, 32, 64, 128)
    ]
    assert (head.anchor_scale, head.topk, head.reg_max, head.box_sides.out_channels) == (6.0, 5, 7, 32)
    assert head.loss_weights == {"loss_cls": 0.1, "loss_box": 0.2, "loss_dfl": 0.3}
    assert (head.score_thresh, head.pre_nms_topk, head.nms_thresh, head.soft_nms) == (0.1, 50, 0.4, True)
    assert head.detections_per_image == 33


@pytest.mark.slow
def test_learns_a_few_objects(head, make_pyramid, targets):
    """Overfitted to a random pyramid, the head detects its objects."""
    pyramid = make_pyramid(SIZES)
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    for _ in range(200):
        loss = sum(head(pyramid, targets)[0].values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    head.eval()
    for target, detections in zip(targets, head.inference(pyramid)):
        ious = box_iou(target.gt_boxes.tensor, detections.pred_boxes.tensor[: len(target)])
        assert ious.amax(1).min() > 0.6
        assert torch.equal(detections.pred_classes[ious.argmax(1)], target.gt_classes)
