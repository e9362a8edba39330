"""Soft non-maximum suppression, which torchvision does not have."""

import numpy as np
import torch
from torch import Tensor
from torchvision.ops import box_iou

__all__ = ["soft_nms"]


def soft_nms(
    boxes: Tensor, scores: Tensor, classes: Tensor, iou_threshold: float, min_score: float = 1e-3
) -> tuple[Tensor, Tensor]:
    """Class-wise soft-NMS with linear decay.

    The box with the highest score is kept, and the scores of those of its class that overlap it by at least
    ``iou_threshold`` are multiplied by 1 - IoU; then the same again with the boxes that are left.
    Source: Soft-NMS (Bodla et al., ICCV 2017), equation 2.

    Args:
        boxes: [N, 4] xyxy.
        scores: [N].
        classes: [N] int64.
        iou_threshold: overlap from which on scores decay.
        min_score: boxes whose score is or falls below this are dropped.

    Returns:
        Indices into the boxes, by falling new score, and these scores.
    """
    new_scores = np.zeros(len(boxes), dtype=np.float32)
    # Every step depends on the one before it, so the steps run on the CPU: one small row at a time.
    boxes_cpu, scores_cpu, classes_cpu = (x.detach().float().cpu() for x in (boxes, scores, classes))
    candidates = scores_cpu >= min_score
    for label in classes_cpu[candidates].unique():
        index = torch.nonzero(candidates & (classes_cpu == label)).flatten()
        iou = box_iou(boxes_cpu[index], boxes_cpu[index]).numpy()
        decay = np.where(iou >= iou_threshold, 1 - iou, np.float32(1))
        left = scores_cpu[index].numpy()
        index = index.numpy()
        while (score := left[best := left.argmax()]) >= max(min_score, np.finfo(np.float32).tiny):
            new_scores[index[best]] = score
            left *= decay[best]
            left[best] = 0
    new_scores = torch.from_numpy(new_scores)
    order = new_scores.argsort(descending=True, stable=True)[: int((new_scores > 0).sum())]
    return order.to(boxes.device), new_scores[order].to(boxes.device)
