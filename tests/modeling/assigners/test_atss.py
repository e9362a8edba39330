import json
import math
import statistics
from pathlib import Path

import pytest
import torch
from torchvision.ops import box_iou

from codetr_d2.modeling.assigners.atss import assign_atss

REFERENCE = Path(__file__).parents[2] / "reference" / "data" / "losses" / "co_deformable_detr_r50.json"
STRIDES = [8, 16, 32, 64, 128]


def square_anchors(image_size):
    """One anchor of 8 strides at the top left corner of each cell that the image reaches."""
    levels = []
    for stride in STRIDES:
        ys = torch.arange(math.ceil(image_size[0] / stride)) * stride
        xs = torch.arange(math.ceil(image_size[1] / stride)) * stride
        centers = torch.stack([xs.repeat(len(ys)), ys.repeat_interleave(len(xs))], dim=1).float()
        levels.append(torch.cat([centers - 4 * stride, centers + 4 * stride], dim=1))
    return torch.cat(levels), [len(x) for x in levels]


def slow_atss(anchors, anchors_per_level, gt_boxes, topk=9):
    """The algorithm in plain Python, one ground truth at a time."""
    ious = box_iou(gt_boxes, anchors).tolist()
    centers = [((a[0] + a[2]) / 2, (a[1] + a[3]) / 2) for a in anchors.tolist()]
    best = [(-1.0, -1)] * len(anchors)
    for g, (x1, y1, x2, y2) in enumerate(gt_boxes.tolist()):
        candidates, start = [], 0
        for count in anchors_per_level:
            level = range(start, start + count)
            candidates += sorted(level, key=lambda i: math.dist(centers[i], ((x1 + x2) / 2, (y1 + y2) / 2)))[:topk]
            start += count
        values = [ious[g][i] for i in candidates]
        threshold = statistics.mean(values) + statistics.stdev(values)
        for i in candidates:
            x, y = centers[i]
            inside = min(x - x1, y - y1, x2 - x, y2 - y) > 0.01
            if ious[g][i] >= threshold and inside and ious[g][i] > best[i][0]:
                best[i] = (ious[g][i], g)
    return [g for _, g in best]


@pytest.mark.parametrize("seed", range(12))
def test_equals_the_algorithm_in_plain_python(seed):
    generator = torch.Generator().manual_seed(seed)
    height, width = torch.randint(40, 400, (2,), generator=generator).tolist()
    anchors, counts = square_anchors((height, width))
    size = torch.tensor([width, height])
    corners = torch.rand(15, 2, 2, generator=generator) * size
    gt_boxes = torch.cat([corners.amin(1), corners.amax(1) + 3], dim=1)
    expected = slow_atss(anchors, counts, gt_boxes)
    assert any(g >= 0 for g in expected)
    assert assign_atss(anchors, counts, gt_boxes).tolist() == expected


@pytest.mark.parametrize("image", [0, 1])
def test_equals_the_published_implementation(image):
    reference = json.loads(REFERENCE.read_text())
    gt_boxes = torch.tensor(reference["meta"]["gt"][image]["boxes_xyxy_pixels"])
    anchors, counts = square_anchors(reference["meta"]["image_sizes_hw"][image])
    assigned = assign_atss(anchors, counts, gt_boxes)
    positive = (assigned >= 0).nonzero().squeeze(1)
    expected = reference["intermediate"]["atss_assigned_inside_valid"][image]
    assert torch.stack([positive, assigned[positive]], dim=1).tolist() == expected
    assert len(positive) == reference["intermediate"]["atss_positive_per_image"][image]


def test_no_ground_truth_and_no_anchors():
    anchors, counts = square_anchors((64, 64))
    assert assign_atss(anchors, counts, torch.zeros(0, 4)).tolist() == [-1] * len(anchors)
    assert assign_atss(anchors[:0], [0] * 5, torch.tensor([[0.0, 0, 9, 9]])).tolist() == []


def test_an_anchor_claimed_twice_goes_to_the_larger_overlap_then_to_the_first():
    anchors, counts = square_anchors((64, 64))
    box = torch.tensor([4.0, 4.0, 60.0, 60.0])
    small = torch.tensor([10.0, 10.0, 50.0, 50.0])
    alone = assign_atss(anchors, counts, box[None]) >= 0
    both = assign_atss(anchors, counts, torch.stack([small, box]))
    shared = alone & (assign_atss(anchors, counts, small[None]) >= 0)
    assert shared.any()
    ious = box_iou(torch.stack([small, box]), anchors)
    assert torch.equal(both[shared], ious.argmax(0)[shared])
    twice = assign_atss(anchors, counts, torch.stack([box, box]))
    assert torch.equal(twice, torch.where(alone, 0, -1))
