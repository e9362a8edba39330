"""Predictions of the query head -> detections."""

import torch
from detectron2.structures import Boxes, Instances
from torch import Tensor
from torchvision.ops import box_convert

from ..layers import soft_nms

__all__ = ["detections_from_queries"]


def detections_from_queries(
    logits: Tensor,
    boxes: Tensor,
    image_sizes: list[tuple[int, int]],
    max_detections: int,
    soft_nms_thresh: float = 0.0,
) -> list[Instances]:
    """The best pairs of query and class of each image. A query may be detected as several classes.

    Args:
        logits: [B, Q, K] class logits of the last layer.
        boxes: [B, Q, 4] cxcywh normalised by the image size.
        image_sizes: (height, width) of each image in pixels of the network input.
        max_detections: at most so many for each image.
        soft_nms_thresh: > 0: as many pairs as there are queries go through soft-NMS with this IoU first.

    Returns:
        For each image ``pred_boxes`` (xyxy pixels of the network input, clipped), ``scores`` and ``pred_classes``,
        by descending score.

    Raises:
        FloatingPointError: a box or a score is not finite.
    """
    num_classes = logits.shape[-1]
    num_kept = logits.shape[1] if soft_nms_thresh > 0 else max_detections
    scores, index = logits.sigmoid().flatten(1).topk(min(num_kept, logits[0].numel()), dim=1)
    query, label = index // num_classes, index % num_classes
    boxes = box_convert(boxes, "cxcywh", "xyxy").gather(1, query.unsqueeze(-1).expand(-1, -1, 4))
    if not (scores.isfinite().all() & boxes.isfinite().all()):
        raise FloatingPointError("the model's predictions are not finite (NaN or infinite)")
    results = []
    for i, (height, width) in enumerate(image_sizes):
        result = Instances((height, width))
        result.pred_boxes = Boxes(boxes[i] * torch.tensor([width, height, width, height], device=boxes.device))
        result.pred_boxes.clip((height, width))
        result.scores = scores[i]
        result.pred_classes = label[i]
        if soft_nms_thresh > 0:
            kept, new_scores = soft_nms(result.pred_boxes.tensor, scores[i], label[i], soft_nms_thresh)
            result = result[kept[:max_detections]]
            result.scores = new_scores[:max_detections]
        results.append(result)
    return results
