"""What the base of one-stage heads does for heads unlike ATSS, shown on one with two anchors for each cell."""

import dataclasses
import math

import pytest
import torch
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from torchvision.ops import box_iou

from codetr_d2.errors import InputError
from codetr_d2.modeling.auxiliary import AUX_HEAD_REGISTRY, DenseHead
from codetr_d2.modeling.auxiliary.dense import BACKGROUND, IGNORED

SIZES = [(96, 128), (80, 90)]
STRIDES = [8, 16, 32, 64, 128]


class PairHead(DenseHead):
    """Two anchors, of 4 and 8 strides, at each cell. It keeps what it has been given."""

    loss_names = ("loss_cls", "loss_box", "loss_quality")

    def __init__(self, **kwargs):
        generator = DefaultAnchorGenerator(
            sizes=[[4 * s, 8 * s] for s in STRIDES], aspect_ratios=[1.0], strides=STRIDES, offset=0.5
        )
        weights = {"loss_cls": 1.0, "loss_box": 2.0, "loss_quality": 3.0}
        super().__init__(
            in_channels=16, strides=STRIDES, anchor_generator=generator, num_classes=3, loss_weights=weights, **kwargs
        )
        self.offsets = self.predictor(4)
        self.quality = self.predictor(1)
        self.given = []

    def predict_boxes(self, x, level):
        return self.offsets(x) + level, self.quality(x)

    def assign(self, anchors, anchors_per_level, gt_boxes):
        """Well covered anchors are positive and poorly covered ones ignored."""
        self.given.append((anchors, anchors_per_level))
        iou, index = box_iou(anchors, gt_boxes).max(1)
        return torch.where(iou > 0.5, index, torch.where(iou > 0.3, IGNORED, BACKGROUND))

    def losses(self, predictions, targets):
        self.targets = targets
        return dict(zip(self.loss_names, [x.square().mean() for x in predictions]))

    def decode(self, predictions, anchors):
        return anchors + predictions


@pytest.fixture
def targets(make_targets):
    return [
        make_targets(SIZES[0], [[10, 10, 60, 70], [50, 20, 120, 90]], [2, 0]),
        make_targets(SIZES[1], [[30, 25, 90, 80]], [1]),
    ]


def slow_rows(x, image):
    """[B, 2 * D, h, w] -> the two rows of each cell, as lists of D numbers."""
    height, width = x.shape[-2:]
    pairs = x[image].unflatten(0, (2, -1))  # an anchor's channels lie together
    return [pairs[anchor, :, i, j].tolist() for i in range(height) for j in range(width) for anchor in range(2)]


def test_rows_of_predictions_are_those_of_the_anchors(make_pyramid):
    head = PairHead(num_convs=0)
    maps = make_pyramid(SIZES).maps()
    anchors = head.anchor_generator(maps)
    predictions = head.predict(maps)
    for level, (x, (logits, boxes, quality)) in enumerate(zip(maps, predictions)):
        n = 2 * x[0, 0].numel()
        assert len(anchors[level]) == n
        assert logits.shape == (2, n, 3) and boxes.shape == (2, n, 4) and quality.shape == (2, n)
        sides = anchors[level].tensor[:, 2] - anchors[level].tensor[:, 0]
        assert sides.tolist() == [4.0 * STRIDES[level], 8.0 * STRIDES[level]] * (n // 2)
        for image in range(2):
            for ours, conv, bias in ((logits, head.cls_score, 0), (boxes, head.offsets, level)):
                expected = torch.tensor(slow_rows(conv(x) + bias, image))
                torch.testing.assert_close(ours[image], expected)
            expected = torch.tensor(slow_rows(head.quality(x), image)).squeeze(1)
            torch.testing.assert_close(quality[image], expected)


class PaddingTrainedHead(PairHead):
    """Its anchors in the padding are trained like any other."""

    def training_sizes(self, geometry):
        return [geometry.batch_shape] * 2


@pytest.mark.parametrize("kind, sizes", [(PairHead, [(96, 128), (96, 96)]), (PaddingTrainedHead, [(128, 160)] * 2)])
def test_targets(make_pyramid, targets, kind, sizes):
    """Anchors are trained where an image reaches with its own padding, or wherever the head wants."""
    head, pyramid = kind(), make_pyramid(SIZES, canvas=(128, 160))
    pyramid.geometry = dataclasses.replace(pyramid.geometry, padded_sizes=[(96, 128), (96, 96)])
    losses, samples = head(pyramid, targets)
    logits, boxes, quality = (torch.cat(x, dim=1) for x in zip(*head.predict(pyramid.maps())))
    expected = {"loss_cls": logits, "loss_box": boxes, "loss_quality": quality}
    for (name, loss), weight in zip(losses.items(), (1, 2, 3), strict=True):
        torch.testing.assert_close(loss, weight * expected[name].square().mean())
    anchors = torch.cat([x.tensor for x in head.anchor_generator(pyramid.maps())])
    assert torch.equal(head.targets.anchors, anchors)
    for i, (size, target, (given, counts)) in enumerate(zip(sizes, targets, head.given, strict=True)):
        # Cells that the image reaches, two anchors each.
        assert counts == [2 * math.ceil(size[0] / s) * math.ceil(size[1] / s) for s in STRIDES]
        inside = ((anchors[:, :2] + anchors[:, 2:]) / 2 < _reach(anchors, pyramid, size)).all(1)
        assert torch.equal(given, anchors[inside]) and inside.all() == (kind is PaddingTrainedHead)

        iou, gt = box_iou(anchors, target.gt_boxes.tensor).max(1)
        positive, ignored = inside & (iou > 0.5), inside & (iou > 0.3) & (iou <= 0.5)
        assert positive.any() and ignored.any() and (ignored & ~positive).any()
        assert torch.equal(head.targets.is_positive[i], positive)
        assert torch.equal(head.targets.is_trained[i], inside & ~ignored)
        labels = torch.where(positive, target.gt_classes[gt], 3)
        gt_boxes = target.gt_boxes.tensor[gt] * positive[:, None]
        assert torch.equal(samples.labels[i], labels) and torch.equal(head.targets.labels[i], labels)
        assert torch.equal(samples.target_boxes[i], gt_boxes) and torch.equal(head.targets.boxes[i], gt_boxes)
        assert torch.equal(samples.boxes[i], anchors * (inside & ~ignored)[:, None])
        assert samples.features[i].data_ptr() == pyramid.tokens[i].data_ptr()  # one for two anchors
    positive_anchors, assigned = head.targets.positives()
    assert torch.equal(positive_anchors, anchors.repeat(2, 1)[head.targets.is_positive.flatten()])
    assert torch.equal(assigned, head.targets.boxes[head.targets.is_positive])


def _reach(anchors, pyramid, size):
    """[S, 2] right and lower end of the cells that an image reaches, on the level of each anchor."""
    ends = [[math.ceil(size[1] / s) * s, math.ceil(size[0] / s) * s] for s in STRIDES]
    return torch.cat([torch.tensor([end] * 2 * n) for end, n in zip(ends, pyramid.geometry.level_sizes)])


def test_an_assignment_is_asked_for_images_with_objects_only(make_pyramid, make_targets, targets):
    head = PairHead()
    _, samples = head(make_pyramid(SIZES), [make_targets(SIZES[0], [], []), targets[1]])
    assert len(head.given) == 1 and (samples.labels[0] == 3).all() and (samples.labels[1] < 3).any()
    assert torch.equal(head.targets.is_trained[0], torch.ones(len(samples.labels[0]), dtype=torch.bool))


class RefiningHead(PairHead):
    """Of the anchors that it has assigned, it keeps those that it gives another class than the first."""

    def refine(self, assigned, anchors, predictions, targets):
        self.refined = assigned, anchors, targets
        return torch.where(predictions[0].argmax(-1) == 0, BACKGROUND, assigned)


def test_an_assignment_is_refined_by_predictions(make_pyramid, targets):
    plain, head = PairHead(), RefiningHead()
    head.load_state_dict(plain.state_dict())
    pyramid = make_pyramid(SIZES)
    with torch.no_grad():
        _, before = plain(pyramid, targets)
        _, after = head(pyramid, targets)
        logits = torch.cat([x[0] for x in head.predict(pyramid.maps())], dim=1)
    assigned, anchors, given = head.refined
    assert [len(x) for x in anchors] == [2 * n for n in pyramid.geometry.level_sizes] and given is targets
    for i in range(2):
        positive = before.labels[i] < 3
        assert torch.equal(assigned[i] >= 0, positive)
        kept = positive & (logits[i].argmax(1) > 0)
        assert 0 < kept.sum() < positive.sum()
        assert torch.equal(after.labels[i], torch.where(kept, before.labels[i], 3))
        assert torch.equal(after.target_boxes[i], before.target_boxes[i] * kept[:, None])


@pytest.mark.parametrize("kind", [x for _, x in AUX_HEAD_REGISTRY if issubclass(x, DenseHead)])
def test_wrong_options_are_named(cfg, kind):
    node = cfg.MODEL[kind.options]
    kind.check_options(cfg)
    wrong = {"NUM_CONVS": -1, "PRE_NMS_TOPK_TEST": 0, "SCORE_THRESH_TEST": 1.0, "NMS_THRESH_TEST": 1.5}
    wrong |= {"BBOX_REG_WEIGHTS": (1.0, 1.0), "TOPK": 0, "ANCHOR_SCALE": 0.0, "REG_MAX": 0}
    for name in [name for name in wrong if name in node]:
        right, node[name] = node[name], wrong[name]
        with pytest.raises(InputError, match=rf"^MODEL\.{kind.options}\.{name} is "):
            kind.check_options(cfg)
        node[name] = right


def test_towers(make_pyramid):
    def parameters(**kwargs):
        return {name for name, _ in PairHead(**kwargs).named_parameters() if "tower" in name}

    towers = ["cls_tower.0", "cls_tower.1", "box_tower.0", "box_tower.1"]
    assert parameters(num_convs=0) == set()
    assert parameters(num_convs=2) == {f"{x}.{y}" for x in towers for y in ("weight", "norm.weight", "norm.bias")}
    assert parameters(num_convs=2, norm=False, conv_bias=True) == {
        f"{x}.{y}" for x in towers for y in ("weight", "bias")
    }
    head = PairHead(norm=False, conv_bias=True)
    x = make_pyramid(SIZES).maps()[0]
    conv = head.cls_tower[0]
    expected = torch.nn.functional.conv2d(x, conv.weight, conv.bias, padding=1).clamp(min=0)
    torch.testing.assert_close(head.cls_tower(x), expected)


@pytest.mark.parametrize("topk", [20, 10**6])
def test_what_is_detected(make_pyramid, topk):
    """The best (anchor, class) pairs of each level above the threshold, as no box is suppressed."""
    head = PairHead(nms_thresh=1.0, score_thresh=0.5, pre_nms_topk=topk, detections_per_image=10**6)
    with torch.no_grad():
        head.cls_score.bias.zero_()
        head.cls_score.weight.mul_(30)
    pyramid = make_pyramid(SIZES)
    levels = [x.tensor for x in head.anchor_generator(pyramid.maps())]
    for i, ((height, width), found) in enumerate(zip(SIZES, head.inference(pyramid), strict=True)):
        expected = []
        for anchors, (logits, offsets, _) in zip(levels, head.predict(pyramid.maps())):
            boxes = anchors + offsets[i].detach()
            boxes[:, 0::2], boxes[:, 1::2] = boxes[:, 0::2].clamp(0, width), boxes[:, 1::2].clamp(0, height)
            pairs = [
                (p, c, *box)
                for box, row in zip(boxes.tolist(), logits[i].sigmoid().tolist())
                for c, p in enumerate(row)
                if p > 0.5
            ]
            best = sorted(pairs, reverse=True)[:topk]
            expected += [x for x in best if x[4] > x[2] and x[5] > x[3]]  # boxes with an area
        rows = torch.stack([found.scores, found.pred_classes.float(), *found.pred_boxes.tensor.unbind(1)], dim=1)
        expected = torch.tensor(sorted(expected, reverse=True))
        assert len(expected) > 20
        torch.testing.assert_close(rows[:, 0], expected[:, 0])
        order = [sorted(map(tuple, x.round(decimals=3).tolist())) for x in (rows, expected)]
        torch.testing.assert_close(torch.tensor(order[0]), torch.tensor(order[1]), rtol=1e-4, atol=2e-3)
