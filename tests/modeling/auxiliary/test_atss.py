import json
import math
from pathlib import Path

import pytest
import torch
from torch.nn import functional as F
from torchvision.ops import box_iou, generalized_box_iou_loss, sigmoid_focal_loss

from codetr_d2.modeling.auxiliary import ATSSHead, build_auxiliary_head

REFERENCE = Path(__file__).parents[2] / "reference" / "data" / "losses" / "co_deformable_detr_r50.json"
SIZES = [(96, 128), (80, 90)]


@pytest.fixture
def head(cfg, input_shapes):
    torch.manual_seed(0)
    head = build_auxiliary_head("atss", cfg, input_shapes)
    assert isinstance(head, ATSSHead)
    return head


@pytest.fixture
def targets(make_targets):
    return [
        make_targets(SIZES[0], [[10, 10, 60, 70], [50, 20, 120, 90]], [2, 0]),
        make_targets(SIZES[1], [[5, 5, 50, 60]], [1]),
    ]


def test_candidates(head, make_pyramid, targets):
    """All cells in the order of the tokens: their anchors, zero in the padding, and the tokens themselves."""
    pyramid = make_pyramid(SIZES)
    _, samples = head(pyramid, targets)
    for i, (height, width) in enumerate(SIZES):
        expected = []
        for stride, (h, w) in zip(pyramid.geometry.strides, pyramid.geometry.shapes):
            for y in range(h):
                for x in range(w):
                    inside = y < math.ceil(height / stride) and x < math.ceil(width / stride)
                    expected.append([stride * v * inside for v in (x - 4, y - 4, x + 4, y + 4)])
        assert samples.boxes[i].tolist() == expected
        assert samples.labels[i].shape == (len(expected),) and samples.target_boxes[i].shape == (len(expected), 4)
        assert samples.features[i].data_ptr() == pyramid.tokens[i].data_ptr()
        padding = (samples.boxes[i] == 0).all(1)
        assert padding.any() == (i == 1)
        assert (samples.labels[i][padding] == 3).all()
        positive = samples.labels[i] < 3
        assert positive.sum() >= len(targets[i])
        gt_index = (samples.target_boxes[i][positive][:, None] == targets[i].gt_boxes.tensor).all(-1).int().argmax(1)
        assert torch.equal(samples.labels[i][positive], targets[i].gt_classes[gt_index])


def test_positives_equal_the_published(cfg, input_shapes, make_pyramid, make_targets):
    reference = json.loads(REFERENCE.read_text())
    cfg.MODEL.CODETR.NUM_CLASSES = 80
    sizes = [tuple(size) for size in reference["meta"]["image_sizes_hw"]]
    targets = [
        make_targets(size, gt["boxes_xyxy_pixels"], gt["labels"]) for size, gt in zip(sizes, reference["meta"]["gt"])
    ]
    pyramid = make_pyramid(sizes)
    _, samples = build_auxiliary_head("atss", cfg, input_shapes)(pyramid, targets)
    for i, expected in enumerate(reference["intermediate"]["atss_assigned_inside_valid"]):
        valid = ~pyramid.geometry.padding_mask[i]
        positive = (samples.labels[i][valid] < 80).nonzero().squeeze(1)
        assert positive.tolist() == [anchor for anchor, _ in expected]
        classes = [reference["meta"]["gt"][i]["labels"][gt] for _, gt in expected]
        assert samples.labels[i][valid][positive].tolist() == classes


def test_padding_changes_nothing(head, make_pyramid, targets):
    """The same features in a larger canvas give the same positives and the same losses."""
    plain = make_pyramid(SIZES[:1])
    padded = make_pyramid(SIZES[:1], canvas=(200, 180))
    maps = [torch.zeros_like(x) for x in padded.maps()]
    for large, small in zip(maps, plain.maps()):
        large[..., : small.shape[2], : small.shape[3]] = small
    padded.tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1)
    # Without GroupNorm, whose statistics see the padding, convolutions cannot tell zeros from the end of the map.
    for tower in (head.cls_tower, head.box_tower):
        for conv in tower:
            conv.norm = torch.nn.Identity()
    losses, samples = head(plain, targets[:1])
    padded_losses, padded_samples = head(padded, targets[:1])
    valid = ~padded.geometry.padding_mask[0]
    assert torch.equal(padded_samples.labels[0][valid], samples.labels[0])
    assert torch.equal(padded_samples.target_boxes[0][valid], samples.target_boxes[0])
    for name, loss in losses.items():
        torch.testing.assert_close(padded_losses[name], loss)


def test_losses(head, make_pyramid, targets):
    """The losses computed again from raw predictions with torchvision's functions, one anchor at a time."""
    pyramid = make_pyramid(SIZES)
    with torch.no_grad():
        for x in (head.cls_score, head.box_deltas, head.centerness):
            x.weight.mul_(20)
        for i, scale in enumerate(head.scales):
            scale.fill_(1 + 0.1 * i)
    losses, samples = head(pyramid, targets)
    predictions = [torch.cat(x, dim=1) for x in zip(*head.predict(pyramid.maps()))]
    num_positive, cls, box, centerness_loss, centerness_sum = 0, 0, 0, 0, 0
    for i in range(len(SIZES)):
        logits, deltas, centerness = (x[i] for x in predictions)
        labels, valid = samples.labels[i], ~pyramid.geometry.padding_mask[i]
        positive = (labels < 3).nonzero().squeeze(1).tolist()
        num_positive += max(len(positive), 1)
        one_hot = torch.zeros(len(labels), 4).scatter_(1, labels[:, None], 1)[:, :3]
        cls += sigmoid_focal_loss(logits, one_hot, alpha=0.25, gamma=2)[valid].sum()
        for j in positive:
            x1, y1, x2, y2 = samples.boxes[i][j].tolist()
            cx, cy, side = (x1 + x2) / 2, (y1 + y2) / 2, x2 - x1
            dx, dy, dw, dh = deltas[j] * torch.tensor([0.1, 0.1, 0.2, 0.2])
            w, h = side * dw.exp(), side * dh.exp()
            px, py = cx + side * dx, cy + side * dy
            decoded = torch.stack([px - w / 2, py - h / 2, px + w / 2, py + h / 2])
            gt = samples.target_boxes[i][j]
            left, top, right, bottom = cx - gt[0], cy - gt[1], gt[2] - cx, gt[3] - cy
            target = (min(left, right) / max(left, right) * min(top, bottom) / max(top, bottom)).sqrt()
            box += generalized_box_iou_loss(decoded, gt) * target
            centerness_sum += target
            centerness_loss += F.binary_cross_entropy_with_logits(centerness[j], target)
    torch.testing.assert_close(losses["loss_cls"], cls / num_positive)
    torch.testing.assert_close(losses["loss_box"], 2 * box / max(centerness_sum, 1))
    torch.testing.assert_close(losses["loss_centerness"], centerness_loss / num_positive)


def test_every_loss_is_divided_by_a_mean_over_the_processes(head, make_pyramid, targets, other_process):
    """Another process has three times as many positives, as central as these: twice as many on average."""
    alone, _ = head(make_pyramid(SIZES), targets)
    other_process(3)
    for name, loss in head(make_pyramid(SIZES), targets)[0].items():
        torch.testing.assert_close(loss, alone[name] / 2)


def test_initial_scores_are_one_percent(cfg, make_pyramid):
    """Heads of any width can be built, and start with the prior of the focal loss."""
    from detectron2.layers import ShapeSpec

    for channels in (16, 96):
        head = build_auxiliary_head("atss", cfg, [ShapeSpec(channels=channels, stride=s) for s in (8, 16, 32, 64, 128)])
        logits = torch.cat([x[0] for x in head.predict(make_pyramid(SIZES, channels=channels).maps())], dim=1)
        assert logits.shape[2] == 3
        assert logits.sigmoid().mean().item() == pytest.approx(0.01, rel=0.1)


@pytest.mark.parametrize("empty", [(0,), (0, 1)])
def test_images_without_objects(head, make_pyramid, make_targets, targets, empty):
    for i in empty:
        targets[i] = make_targets(SIZES[i], [], [])
    losses, samples = head(make_pyramid(SIZES), targets)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, x in head.named_parameters() if x.grad is None] == []
    for i in empty:
        assert (samples.labels[i] == 3).all()


def test_autocast(head, make_pyramid, targets):
    pyramid = make_pyramid(SIZES)
    pyramid.tokens = pyramid.tokens.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        losses, samples = head(pyramid, targets)
        detections = head.eval().inference(pyramid)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert samples.boxes[0].dtype == torch.float32
    assert detections[0].scores.dtype == torch.float32


def test_inference_ranks_by_class_and_centerness(head, make_pyramid):
    """Few enough cells that no pre-selection takes place: all scores are class times centre-ness probabilities."""
    head.nms_thresh = 1.0
    head.detections_per_image = 10**6
    pyramid = make_pyramid(SIZES)
    for i, detections in enumerate(head.inference(pyramid)):
        levels = head.predict(pyramid.maps())
        scores = torch.cat([(x[i].sigmoid() * c[i, :, None].sigmoid()).flatten() for x, _, c in levels])
        # Boxes that lie outside of the image are empty after clipping, and dropped.
        assert 0 < len(detections) <= len(scores) and detections.pred_boxes.nonempty().all()
        assert (torch.isclose(detections.scores[:, None], scores).any(1)).all()
        assert (detections.scores.diff() <= 0).all()

    head.pre_nms_topk = 1
    head.detections_per_image = 100
    for detections in head.inference(pyramid):
        assert 0 < len(detections) <= 5  # one of each level


def test_options(cfg, input_shapes):
    """Every option of the config reaches the head."""
    options = {"NUM_CONVS": 3, "ANCHOR_SCALE": 6.0, "TOPK": 5, "BBOX_REG_WEIGHTS": (1.0, 2.0, 3.0, 4.0)}
    options |= {"LOSS_CLS": 0.1, "LOSS_BOX": 0.2, "LOSS_CENTERNESS": 0.3}
    options |= {"SCORE_THRESH_TEST": 0.1, "PRE_NMS_TOPK_TEST": 50, "NMS_THRESH_TEST": 0.4, "SOFT_NMS": True}
    assert set(options) == set(cfg.MODEL.ATSS)
    cfg.MODEL.ATSS.update(options)
    cfg.TEST.DETECTIONS_PER_IMAGE = 33
    head = build_auxiliary_head("atss", cfg, input_shapes)
    assert len(head.cls_tower) == len(head.box_tower) == 3
    assert [x.tolist() for x in head.anchor_generator.cell_anchors] == [
        [[-3 * s, -3 * s, 3 * s, 3 * s]] for s in (8, 16, 32, 64, 128)
    ]
    assert (head.topk, head.box2box_transform.weights) == (5, (1.0, 2.0, 3.0, 4.0))
    assert head.loss_weights == {"loss_cls": 0.1, "loss_box": 0.2, "loss_centerness": 0.3}
    assert head.score_thresh == 0.1
    assert (head.pre_nms_topk, head.nms_thresh, head.soft_nms, head.detections_per_image) == (50, 0.4, True, 33)


def test_soft_nms_lowers_scores_instead_of_dropping(head, make_pyramid):
    head.nms_thresh, head.detections_per_image = 0.3, 10**6
    pyramid = make_pyramid(SIZES)
    hard = head.inference(pyramid)
    head.soft_nms = True
    for kept, soft in zip(hard, head.inference(pyramid)):
        assert len(soft) > len(kept)
        assert (soft.scores.diff() <= 0).all()
        assert kept.scores[0] == soft.scores[0] and torch.equal(kept.pred_boxes.tensor[0], soft.pred_boxes.tensor[0])


def test_learns_a_few_objects(head, make_pyramid, targets):
    """Overfitted to a random pyramid, the head detects its objects."""
    pyramid = make_pyramid(SIZES)
    optimizer = torch.optim.Adam(head.parameters(), lr=5e-3)
    totals = []
    for _ in range(100):
        loss = sum(head(pyramid, targets)[0].values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert totals[-1] < 0.5 * totals[0]
    head.eval()
    for size, target, detections in zip(SIZES, targets, head.inference(pyramid)):
        assert detections.image_size == size and len(detections) <= 100
        boxes, classes = detections.pred_boxes.tensor, detections.pred_classes
        assert (boxes >= 0).all() and (boxes <= torch.tensor([size[1], size[0]] * 2)).all()
        for c in range(3):
            overlaps = box_iou(boxes[classes == c], boxes[classes == c]).fill_diagonal_(0)
            assert overlaps.numel() == 0 or overlaps.max() <= 0.6 + 1e-4
        ious = box_iou(target.gt_boxes.tensor, boxes[: len(target)])
        assert ious.amax(1).min() > 0.6
        assert torch.equal(classes[ious.argmax(1)], target.gt_classes)
