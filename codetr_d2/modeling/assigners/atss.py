"""Adaptive training sample selection."""

import torch
from detectron2.structures.boxes import Boxes, matched_pairwise_iou
from torch import Tensor

__all__ = ["assign_atss"]

# How far inside a ground truth the centre of a positive anchor must lie, in pixels.
MIN_CENTER_MARGIN = 0.01


@torch.no_grad()
def assign_atss(anchors: Tensor, anchors_per_level: list[int], gt_boxes: Tensor, topk: int = 9) -> Tensor:
    """Assign anchors to ground truths by thresholds that adapt to each ground truth.

    The candidates of a ground truth are the ``topk`` anchors of each level whose centres are closest to its own (all
    where the level has fewer). Positive are the candidates whose IoU with it reaches the mean plus the (unbiased)
    standard deviation of the IoUs of all its candidates, and whose centre lies inside it. An anchor that is positive
    for several ground truths goes to the one that it overlaps most, the first of them where that is a tie. IoUs are
    computed for the candidates only, never for all pairs.

    Source: Zhang et al., "Bridging the Gap Between Anchor-based and Anchor-free Detection via Adaptive Training Sample
    Selection", algorithm 1.

    Args:
        anchors: [N, 4] float, xyxy in pixels, level after level. Anchors that shall take no part must be left out.
        anchors_per_level: the number of anchors of each level; they sum to N.
        gt_boxes: [G, 4] float, xyxy in pixels.
        topk: candidates of each level for one ground truth.

    Returns:
        [N] int64, the index of the assigned ground truth, -1 for background.
    """
    num_anchors, num_gt = len(anchors), len(gt_boxes)
    background = torch.full((num_anchors,), -1, dtype=torch.int64, device=anchors.device)
    if num_anchors == 0 or num_gt == 0:
        return background

    anchor_centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    gt_centers = (gt_boxes[:, :2] + gt_boxes[:, 2:]) / 2
    candidates, start = [], 0
    for centers in anchor_centers.split(anchors_per_level):
        # The root is taken, though it keeps the order, because rounding it decides which distances tie.
        distances = (centers[None] - gt_centers[:, None]).square().sum(-1).sqrt()  # [G, anchors of the level]
        candidates.append(distances.topk(min(topk, len(centers)), dim=1, largest=False).indices + start)
        start += len(centers)
    candidates = torch.cat(candidates, dim=1)  # [G, M]

    candidate_gt = torch.arange(num_gt, device=anchors.device)[:, None].expand_as(candidates)
    ious = matched_pairwise_iou(Boxes(anchors[candidates.flatten()]), Boxes(gt_boxes[candidate_gt.flatten()]))
    ious = ious.view_as(candidates)
    threshold = ious.mean(dim=1, keepdim=True) + ious.std(dim=1, keepdim=True)
    centers = anchor_centers[candidates]  # [G, M, 2]
    margins = torch.cat([centers - gt_boxes[:, None, :2], gt_boxes[:, None, 2:] - centers], dim=-1)
    positive = (ious >= threshold) & (margins.amin(-1) > MIN_CENTER_MARGIN)

    anchor_index, gt_index, ious = candidates[positive], candidate_gt[positive], ious[positive]
    best_iou = torch.full_like(anchors[:, 0], -1).scatter_reduce_(0, anchor_index, ious, "amax")
    wins = ious == best_iou[anchor_index]
    first_gt = torch.full_like(background, num_gt).scatter_reduce_(0, anchor_index[wins], gt_index[wins], "amin")
    return torch.where(first_gt < num_gt, first_gt, background)
