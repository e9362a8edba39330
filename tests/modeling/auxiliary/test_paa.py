"""The PAA head, beside the recordings in tests/reference and the contract of all heads."""

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from codetr_d2.modeling.assigners.paa import select_by_mixture
from codetr_d2.modeling.auxiliary import PAAHead, build_auxiliary_head
from codetr_d2.modeling.auxiliary import paa as paa_module

SIZES = [(96, 128), (80, 90)]


@pytest.fixture
def head(cfg, input_shapes):
    head = build_auxiliary_head("paa", cfg, input_shapes)
    assert isinstance(head, PAAHead)
    return head


@pytest.fixture
def targets(make_targets):
    return [
        make_targets(SIZES[0], [[10, 10, 60, 70], [50, 20, 120, 90]], [2, 0]),
        make_targets(SIZES[1], [[5, 5, 50, 60]], [1]),
    ]


def disturb(head):
    with torch.no_grad():
        for x in (head.cls_score, head.box_deltas, head.iou):
            x.weight.mul_(20)
        for i, scale in enumerate(head.scales):
            scale.fill_(1 + 0.1 * i)


def test_losses(head, make_pyramid, targets):
    """Computed again from raw predictions, one anchor at a time."""
    disturb(head)
    pyramid = make_pyramid(SIZES)
    losses, samples = head(pyramid, targets)
    predictions = [torch.cat(x, dim=1) for x in zip(*head.predict(pyramid.maps()))]
    num_positive, cls, box, iou_loss, sum_of_qualities = 0, 0, 0, 0, 0
    for i in range(len(SIZES)):
        logits, deltas, iou = (x[i] for x in predictions)
        labels, valid = samples.labels[i], (samples.boxes[i] != 0).any(1)
        one_hot = torch.zeros(len(labels), 4).scatter_(1, labels[:, None], 1)[:, :3]
        cls += sigmoid_focal_loss(logits, one_hot, alpha=0.25, gamma=2)[valid].sum()
        for j in (labels < 3).nonzero().squeeze(1).tolist():
            x1, y1, x2, y2 = samples.boxes[i][j].tolist()
            cx, cy, side, gt = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1, samples.target_boxes[i][j]
            dx, dy, dw, dh = deltas[j] * torch.tensor([0.1, 0.1, 0.2, 0.2])
            w, h, px, py = side * dw.exp(), side * dh.exp(), cx + side * dx, cy + side * dy
            decoded = torch.stack([px - w / 2, py - h / 2, px + w / 2, py + h / 2])
            quality = box_iou(decoded[None], gt[None]).detach()[0, 0]
            box += quality * generalized_box_iou_loss(decoded, gt)
            iou_loss += F.binary_cross_entropy_with_logits(iou[j], quality)
            sum_of_qualities += quality
            num_positive += 1
    assert num_positive > 2
    torch.testing.assert_close(losses["loss_cls"], cls / num_positive)
    torch.testing.assert_close(losses["loss_box"], 1.3 * box / sum_of_qualities)
    torch.testing.assert_close(losses["loss_iou"], 0.5 * iou_loss / num_positive)


def test_every_loss_is_divided_by_a_mean_over_the_processes(head, make_pyramid, targets, other_process):
    alone, _ = head(make_pyramid(SIZES), targets)
    other_process(3)  # three times as many positives: twice as many on average
    for name, loss in head(make_pyramid(SIZES), targets)[0].items():
        torch.testing.assert_close(loss, alone[name] / 2)


def test_mixtures_are_fitted_for_the_batch_at_once(head, make_pyramid, make_targets, targets, monkeypatch):
    """Objects of different images stay apart, those without an anchor too."""
    calls = []

    def select(losses, objects, levels, topk):
        calls.append((losses, objects, levels))
        return select_by_mixture(losses, objects, levels, topk)

    monkeypatch.setattr(paa_module, "select_by_mixture", select)
    batch = [
        make_targets(SIZES[0], [], []),
        targets[0],
        make_targets(SIZES[0], [[2000, 2000, 2010, 2010]], [0]),
        targets[1],
    ]
    pyramid = make_pyramid([SIZES[0], SIZES[0], SIZES[0], SIZES[1]])
    _, samples = head(pyramid, batch)
    [(losses, objects, levels)] = calls
    assert not losses.requires_grad and levels.dtype == objects.dtype == torch.int64
    assert set(objects.tolist()) == {0, 1, 3} and set(levels.tolist()) == {0, 1}
    assert [bool((labels < 3).any()) for labels in samples.labels] == [False, True, False, True]


def test_score_voting(head):
    """A detection's box is the mean of all its class has around it, weighted by score and closeness."""
    boxes = torch.tensor([[0.0, 0, 10, 10], [0, 0, 10, 8], [5, 5, 15, 15], [20, 20, 30, 30], [0, 0, 10, 9]])
    scores, classes = torch.tensor([0.9, 0.6, 0.3, 0.8, 0.5]), torch.tensor([1, 1, 1, 1, 2])
    found, found_scores, found_classes = head.suppress(boxes, scores, classes)
    # Of class 1 the first suppresses the second; the third overlaps it by 25 / 175.
    assert found_scores.tolist() == pytest.approx([0.9, 0.8, 0.5, 0.3]) and found_classes.tolist() == [1, 1, 2, 1]

    def mean(ious, members):
        weights = torch.tensor([float(s) for s in scores[members]]) * (-((1 - torch.tensor(ious)) ** 2) / 0.025).exp()
        return (weights[:, None] * boxes[members]).sum(0) / weights.sum()

    torch.testing.assert_close(found[0], mean([1.0, 0.8, 25 / 175], [0, 1, 2]))
    torch.testing.assert_close(found[1], boxes[3])  # alone
    torch.testing.assert_close(found[2], boxes[4])  # no other of its class
    torch.testing.assert_close(found[3], mean([25 / 175, 15 / 165, 1.0], [0, 1, 2]))
    assert found[0, 3] < 10  # the second has moved it
    with torch.autocast("cpu", torch.bfloat16):
        assert torch.equal(head.suppress(boxes, scores, classes)[0], found)
    head.score_voting = False
    assert torch.equal(head.suppress(boxes, scores, classes)[0], boxes[[0, 3, 4, 2]])


def test_what_enters_suppression(head):
    """The best anchors by their best class, with every class of these whose score is above the threshold."""
    head.pre_nms_topk, head.score_thresh = 2, 0.3
    p = torch.tensor([[0.9, 0.2, 0.1], [0.8, 0.7, 0.6], [0.5, 0.95, 0.1]])
    iou = torch.tensor([0.5, 0.9, 0.1])  # scores .67 .32 .22, .85 .79 .73, .22 .31 .1
    anchors, classes, scores = head.select(p.logit(), torch.zeros(3, 4), iou.logit())
    assert list(zip(anchors.tolist(), classes.tolist())) == [(1, 0), (1, 1), (1, 2), (0, 0), (0, 1)]
    torch.testing.assert_close(scores, (p * iou[:, None]).sqrt()[anchors, classes])


def test_options(cfg, input_shapes):
    """Every option of the config reaches the head."""
    options = {"NUM_CONVS": 3, "ANCHOR_SCALE": 6.0, "TOPK": 5, "BBOX_REG_WEIGHTS": (1.0, 2.0, 3.0, 4.0)}
    options |= {"IOU_THRESHOLD": 0.2, "LOSS_CLS": 0.1, "LOSS_BOX": 0.2, "LOSS_IOU": 0.3, "SCORE_VOTING": False}
    options |= {"SCORE_THRESH_TEST": 0.1, "PRE_NMS_TOPK_TEST": 50, "NMS_THRESH_TEST": 0.4, "SOFT_NMS": True}
    assert set(options) == set(cfg.MODEL.PAA)
    cfg.MODEL.PAA.update(options)
    cfg.TEST.DETECTIONS_PER_IMAGE = 33
    head = build_auxiliary_head("paa", cfg, input_shapes)
    assert len(head.cls_tower) == len(head.box_tower) == 3
    assert [x.tolist() for x in head.anchor_generator.cell_anchors] == [
        [[-3 * s, -3 * s, 3 * s, 3 * s]] for s in (8, 16, 32, 64, 128)
    ]
    assert (head.topk, head.score_voting, head.box2box_transform.weights) == (5, False, (1.0, 2.0, 3.0, 4.0))
    assert 0.2 in head.matcher.thresholds
    assert head.loss_weights == {"loss_cls": 0.1, "loss_box": 0.2, "loss_iou": 0.3}
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
