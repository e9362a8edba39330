import itertools

import pytest
import torch
from fvcore.nn import sigmoid_focal_loss
from torchvision.ops import box_convert, generalized_box_iou

from codetr_d2.modeling.assigners.hungarian import HungarianMatcher


@pytest.fixture
def problem():
    """Two layers, two images with 3 and 1 objects, 6 queries, 4 classes."""
    labels = torch.tensor([[1, 3, 0], [2, 0, 0]])
    target_boxes = torch.rand(2, 3, 4) * 0.3 + 0.2
    logits, boxes = torch.randn(2, 2, 6, 4), torch.rand(2, 2, 6, 4) * 0.3 + 0.2
    return logits, boxes, labels, target_boxes, torch.tensor([[100.0, 80, 100, 80], [60, 120, 60, 120]]), [3, 1]


def test_cost_against_libraries(problem):
    logits, boxes, labels, target_boxes, sizes, _ = problem
    cost = HungarianMatcher(2.0, 5.0, 2.0).cost(logits, boxes, labels, target_boxes, sizes)
    for layer, image in itertools.product(range(2), range(2)):
        own, target = boxes[layer, image], target_boxes[image]
        expected = 5 * (own[:, None] - target[None]).abs().sum(-1)
        xyxy = [box_convert(x, "cxcywh", "xyxy") * sizes[image] for x in (own, target)]
        expected = expected - 2 * generalized_box_iou(*xyxy)
        logit = logits[layer, image][:, labels[image]]
        focal = [sigmoid_focal_loss(logit, torch.full_like(logit, t), alpha=0.25, gamma=2.0) for t in (1.0, 0.0)]
        torch.testing.assert_close(cost[layer, image], expected + 2 * (focal[0] - focal[1]), rtol=1e-4, atol=1e-4)


def test_match_is_the_cheapest_of_all_assignments(problem):
    *tensors, num_targets = problem
    matcher = HungarianMatcher(2.0, 5.0, 2.0)
    cost = matcher.cost(*tensors)
    first, second = matcher.match([cost, cost[:1] * -1], num_targets)
    assert first.shape == (2, 2, 3) and second.shape == (1, 2, 3)
    for match, costs in ((first, cost), (second, -cost[:1])):
        for layer, image in itertools.product(range(len(match)), range(2)):
            n = num_targets[image]
            assert (match[layer, image, n:] == -1).all()
            total = costs[layer, image, match[layer, image, :n], torch.arange(n)].sum()
            best = min(
                sum(costs[layer, image, q, g] for g, q in enumerate(queries))
                for queries in itertools.permutations(range(6), n)
            )
            torch.testing.assert_close(total, best)


def test_no_objects_more_objects_than_queries_and_nonfinite_costs():
    matcher = HungarianMatcher(1.0, 1.0, 1.0)
    [empty] = matcher.match([torch.zeros(3, 2, 5, 0)], [0, 0])
    assert empty.shape == (3, 2, 0)
    [crowded] = matcher.match([torch.rand(1, 1, 2, 4)], [4])
    assert sorted(crowded.flatten().tolist())[:2] == [-1, -1] and set(crowded.flatten().tolist()) == {-1, 0, 1}
    [broken] = matcher.match([torch.full((1, 1, 3, 2), float("nan"))], [2])
    assert len(set(broken.flatten().tolist())) == 2
