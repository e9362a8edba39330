import pytest
import torch

from codetr_d2.modeling.postprocess import detections_from_queries


def test_best_pairs_of_query_and_class():
    logits = torch.tensor([[[2.0, -1.0, 1.5], [0.0, 3.0, -5.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.9, 0.1, 0.4, 0.4]]])
    [result] = detections_from_queries(logits, boxes, [(100, 200)], max_detections=3)
    assert result.pred_classes.tolist() == [1, 0, 2]
    torch.testing.assert_close(result.scores, torch.tensor([3.0, 2.0, 1.5]).sigmoid())
    expected = [[140.0, 0, 200, 30], [80, 30, 120, 70], [80, 30, 120, 70]]  # the first one is clipped
    torch.testing.assert_close(result.pred_boxes.tensor, torch.tensor(expected))
    assert result.image_size == (100, 200)


def test_fewer_pairs_than_asked_for():
    [result] = detections_from_queries(torch.zeros(1, 2, 3), torch.rand(1, 2, 4), [(10, 10)], max_detections=100)
    assert len(result) == 6


def test_soft_nms_on_as_many_pairs_as_queries():
    """The weaker of two equal boxes of one class falls behind; the third pair of query and class is no candidate."""
    logits = torch.tensor([[[3.0, -9.0], [2.0, -9.0], [-1.0, 1.0]]])
    boxes = torch.tensor([[[0.5, 0.5, 0.2, 0.4], [0.5, 0.5, 0.2, 0.38], [0.3, 0.3, 0.4, 0.4]]])
    [result] = detections_from_queries(logits, boxes, [(100, 200)], max_detections=2, soft_nms_thresh=0.8)
    assert result.pred_classes.tolist() == [0, 1]
    torch.testing.assert_close(result.scores, torch.tensor([3.0, 1.0]).sigmoid())
    [result] = detections_from_queries(logits, boxes, [(100, 200)], max_detections=3, soft_nms_thresh=0.8)
    torch.testing.assert_close(result.scores[2], torch.tensor(2.0).sigmoid() * 0.05, rtol=1e-4, atol=0)


@pytest.mark.parametrize("part", ["logits", "boxes"])
@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_predictions_that_are_not_finite(part, value):
    tensors = {"logits": torch.zeros(2, 5, 3), "boxes": torch.full((2, 5, 4), 0.5)}
    detections_from_queries(**tensors, image_sizes=[(8, 8)] * 2, max_detections=5)
    tensors[part][1, 2, 0] = value
    if (part, value) == ("logits", float("inf")):  # a score of 1
        detections_from_queries(**tensors, image_sizes=[(8, 8)] * 2, max_detections=5)
        return
    with pytest.raises(FloatingPointError, match="not finite"):
        detections_from_queries(**tensors, image_sizes=[(8, 8)] * 2, max_detections=15)
