import pytest
import torch

from codetr_d2.modeling.assigners.fcos import assign_fcos

STRIDES = [8, 16, 32]


def grid(size):
    """The points of each level of a square image, and how many there are on each."""
    levels = []
    for stride in STRIDES:
        axis = (torch.arange(size // stride) + 0.5) * stride
        levels.append(torch.stack(torch.meshgrid(axis, axis, indexing="xy"), dim=-1).view(-1, 2))
    return torch.cat(levels), [len(x) for x in levels]


def slow_assign(points, levels, boxes, radius):
    """The rule, one pair at a time."""
    ranges = [(-1, 64), (64, 128), (128, 1e8)]
    assigned = []
    for (x, y), level in zip(points.tolist(), levels):
        best, best_area = -1, float("inf")
        for i, (x1, y1, x2, y2) in enumerate(boxes.tolist()):
            reach = radius * STRIDES[level]
            is_inside = x1 < x < x2 and y1 < y < y2
            is_central = abs(x - (x1 + x2) / 2) < reach and abs(y - (y1 + y2) / 2) < reach
            low, high = ranges[level]
            fits = low <= max(x - x1, y - y1, x2 - x, y2 - y) <= high
            area = (x2 - x1) * (y2 - y1)
            if is_inside and is_central and fits and area < best_area:
                best, best_area = i, area
        assigned.append(best)
    return assigned


@pytest.mark.parametrize("radius", [1.5, 3.0])
@pytest.mark.parametrize("seed", range(10))
def test_equals_the_rule_applied_one_by_one(seed, radius):
    """Boxes on a grid of 4 pixels, so that points lie on edges, areas are equal and distances are at the limits."""
    generator = torch.Generator().manual_seed(seed)
    corner = torch.randint(0, 48, (30, 2), generator=generator) * 4.0
    sides = torch.randint(1, 48, (30, 2), generator=generator) * 4.0
    boxes = torch.cat([corner, corner + sides], dim=1)
    boxes[20:25] = boxes[:5]  # twins
    points, counts = grid(256)
    levels = [level for level, n in enumerate(counts) for _ in range(n)]
    expected = slow_assign(points, levels, boxes, radius)
    assert assign_fcos(points, counts, STRIDES, boxes, radius).tolist() == expected
    assert len(set(expected)) > 5


def test_a_distance_at_the_limit_belongs_to_both_levels():
    points = torch.tensor([[64.0, 64.0], [64.0, 64.0], [64.0, 64.0]])
    box = torch.tensor([[0.0, 0, 128, 128]])
    assert assign_fcos(points, [1, 1, 1], STRIDES, box).tolist() == [0, 0, -1]
    assert assign_fcos(points, [1, 1, 1], STRIDES, torch.tensor([[0.0, 0, 129, 128]])).tolist() == [-1, 0, -1]


def test_the_ends_have_no_limit():
    points = torch.tensor([[4.0, 4.0], [4.0, 4.0], [5000.0, 5000.0]])
    boxes = torch.tensor([[3.5, 3.5, 4.5, 4.5], [0.0, 0, 10000, 10000]])
    assert assign_fcos(points, [1, 1, 1], STRIDES, boxes).tolist() == [0, -1, 1]


def test_nothing_to_assign():
    points, counts = grid(64)
    assert (assign_fcos(points, counts, STRIDES, torch.zeros(0, 4)) == -1).all()
    flat = torch.tensor([[10.0, 10, 10, 40]])  # no point is strictly inside
    assert (assign_fcos(points, counts, STRIDES, flat) == -1).all()
