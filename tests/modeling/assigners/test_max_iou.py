import pytest
import torch
from detectron2.modeling.matcher import Matcher
from torchvision.ops import box_iou

from codetr_d2.modeling.assigners.max_iou import MaxIoUMatcher


def random_boxes(n, generator, size=64):
    centers = torch.rand(n, 2, generator=generator) * size
    sides = torch.rand(n, 2, generator=generator) * size / 2 + 2
    return torch.cat([centers - sides / 2, centers + sides / 2], dim=1)


def slow_match(ious, thresholds, labels, min_pos_iou):
    """The rule, one object at a time."""
    num_gt, num_predictions = ious.shape
    matches, out = [0] * num_predictions, [labels[0]] * num_predictions
    for n in range(num_predictions):
        column = ious[:, n].tolist()
        matches[n] = column.index(max(column))
        out[n] = labels[sum(max(column) >= t for t in thresholds)]
    for m in range(num_gt):
        row = ious[m].tolist()
        if max(row) >= min_pos_iou:
            for n, iou in enumerate(row):
                if iou == max(row):
                    matches[n], out[n] = m, 1
    return matches, out


@pytest.mark.parametrize("seed", range(20))
def test_equals_the_rule_applied_one_by_one(seed):
    generator = torch.Generator().manual_seed(seed)
    # Boxes on a coarse grid, so that many overlaps tie.
    gt = random_boxes(6, generator).div(8).round().mul(8)
    gt[:, 2:] = torch.maximum(gt[:, 2:], gt[:, :2] + 8)
    predictions = random_boxes(150, generator).div(8).round().mul(8)
    predictions[:, 2:] = torch.maximum(predictions[:, 2:], predictions[:, :2] + 8)
    ious = box_iou(gt, predictions)
    matches, labels = MaxIoUMatcher([0.3, 0.7], [0, -1, 1], min_pos_iou=0.3)(ious)
    expected_matches, expected_labels = slow_match(ious, [0.3, 0.7], [0, -1, 1], 0.3)
    assert labels.tolist() == expected_labels
    assert matches.tolist() == expected_matches
    assert labels.dtype == torch.int8 and matches.dtype == torch.int64


def test_a_claimed_prediction_belongs_to_the_last_that_claims_it():
    ious = torch.tensor([[0.8, 0.1], [0.4, 0.3], [0.4, 0.0]])
    matches, labels = MaxIoUMatcher([0.3, 0.7], [0, -1, 1], min_pos_iou=0.3)(ious)
    assert matches[0] == 2 and labels[0] == 1
    assert labels[1] == -1


def test_no_claim_below_the_minimum():
    ious = torch.tensor([[0.2, 0.1]])
    assert MaxIoUMatcher([0.3, 0.7], [0, -1, 1], min_pos_iou=0.3)(ious)[1].tolist() == [0, 0]
    assert MaxIoUMatcher([0.3, 0.7], [0, -1, 1], min_pos_iou=0.2)(ious)[1].tolist() == [1, 0]


def test_an_object_that_overlaps_nothing_claims_nothing():
    ious = torch.tensor([[0.0, 0.0, 0.0], [0.0, 0.2, 0.0]])
    matches, labels = MaxIoUMatcher([0.4, 0.5], [0, -1, 1], min_pos_iou=0.0)(ious)
    assert labels.tolist() == [0, 1, 0] and matches[1] == 1


def test_equals_detectron2_where_nothing_is_claimed():
    ious = torch.rand(5, 300, generator=torch.Generator().manual_seed(0))
    ours = MaxIoUMatcher([0.3, 0.7], [0, -1, 1], min_pos_iou=2.0)(ious)
    theirs = Matcher([0.3, 0.7], [0, -1, 1])(ious)
    assert all(torch.equal(a, b) for a, b in zip(ours, theirs))


def test_without_ground_truth_all_is_negative():
    matches, labels = MaxIoUMatcher([0.3, 0.7], [0, -1, 1], min_pos_iou=0.3)(torch.zeros(0, 7))
    assert labels.tolist() == [0] * 7 and matches.tolist() == [0] * 7
