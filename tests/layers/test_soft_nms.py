import pytest
import torch
from torchvision.ops import batched_nms, box_iou

from codetr_d2.layers import soft_nms


def make_boxes(n: int) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    corner = torch.rand(n, 2) * 40
    boxes = torch.cat((corner, corner + 10 + torch.rand(n, 2) * 30), dim=1)
    return boxes, torch.rand(n), torch.randint(3, (n,))


def naive(boxes, scores, classes, threshold, min_score):
    """The definition, box by box."""
    scores, left, kept = scores.clone().tolist(), set(range(len(boxes))), []
    iou = box_iou(boxes, boxes)
    while left:
        best = max(left, key=lambda i: scores[i])
        left.remove(best)
        if scores[best] < min_score:
            break
        kept.append((best, scores[best]))
        for i in left:
            if classes[i] == classes[best] and iou[best, i] >= threshold:
                scores[i] *= 1 - iou[best, i].item()
    return kept


@pytest.mark.parametrize("threshold", [0.3, 0.6])
def test_against_the_definition(threshold):
    boxes, scores, classes = make_boxes(60)
    index, new_scores = soft_nms(boxes, scores, classes, threshold, min_score=0.05)
    expected = naive(boxes, scores, classes, threshold, 0.05)
    assert index.tolist() == [i for i, _ in expected]
    torch.testing.assert_close(new_scores, torch.tensor([score for _, score in expected]))
    assert (new_scores < scores[index]).any() and len(index) < 60


def test_equals_hard_nms_where_boxes_coincide():
    """Boxes that coincide or lie apart: soft-NMS leaves a score or takes all of it, also without a least score."""
    boxes, scores, classes = make_boxes(20)
    boxes = (boxes + torch.arange(20)[:, None] * 100).repeat(3, 1)
    scores, classes = torch.cat((scores, scores * 0.9, scores * 0.8)), classes.repeat(3)
    index, new_scores = soft_nms(boxes, scores, classes, 0.5, min_score=0.0)
    assert index.tolist() == batched_nms(boxes, scores, classes, 0.5).tolist()
    assert torch.equal(new_scores, scores[index])


def test_permutation():
    boxes, scores, classes = make_boxes(30)
    order = torch.randperm(30)
    index, new_scores = soft_nms(boxes, scores, classes, 0.4)
    shuffled, same = soft_nms(boxes[order], scores[order], classes[order], 0.4)
    assert torch.equal(order[shuffled], index) and torch.equal(same, new_scores)


def test_nothing_left():
    empty = torch.zeros(0)
    index, scores = soft_nms(empty.view(0, 4), empty, empty.long(), 0.5)
    assert len(index) == len(scores) == 0
    index, _ = soft_nms(torch.rand(3, 4), torch.full((3,), 1e-5), torch.zeros(3).long(), 0.5)
    assert len(index) == 0
