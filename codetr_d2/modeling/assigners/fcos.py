"""Assignment of points to the objects whose centre they are near, the rule of FCOS."""

import math

import torch
from torch import Tensor

__all__ = ["assign_fcos"]

# The largest distance from a point to a side of its object at which a coarser level takes over, in strides.
MAX_DISTANCE = 8


@torch.no_grad()
def assign_fcos(
    points: Tensor, points_per_level: list[int], strides: list[int], gt_boxes: Tensor, radius: float = 1.5
) -> Tensor:
    """Assign points to ground truths by place and size.

    A point is positive for a ground truth if it lies strictly inside it, strictly inside the square around its centre
    of the half side ``radius`` strides, and if the largest of its distances to the four sides suits its level: between
    8 strides of the level before (0 on the finest) and 8 of its own (no limit on the coarsest), both included. Of
    several ground truths it takes the smallest, the first of equals.

    Source: Tian et al., "FCOS: Fully Convolutional One-Stage Object Detection", section 3, with the centre sampling
    of its authors' later version.

    Args:
        points: [N, 2] float, (x, y) in pixels, level after level.
        points_per_level: the number of points of each level; they sum to N.
        strides: stride of each level in pixels, from fine to coarse.
        gt_boxes: [G, 4] float, xyxy in pixels.
        radius: half the side of the square, in strides.

    Returns:
        [N] int64, the index of the assigned ground truth, -1 for background.
    """
    num_gt = len(gt_boxes)
    if num_gt == 0:
        return torch.full((len(points),), -1, dtype=torch.int64, device=points.device)
    order = (gt_boxes[:, 2:] - gt_boxes[:, :2]).prod(dim=1).argsort(stable=True)  # the smallest first
    gt_boxes = gt_boxes[order, None]  # [G, 1, 4]
    centers = (gt_boxes[..., :2] + gt_boxes[..., 2:]) / 2
    rank = torch.arange(num_gt, device=points.device)[:, None]
    limits = [0, *(MAX_DISTANCE * stride for stride in strides[:-1]), math.inf]
    assigned = []
    for level, (level_points, stride) in enumerate(zip(points.split(points_per_level), strides)):
        left_top, right_bottom = level_points - gt_boxes[..., :2], gt_boxes[..., 2:] - level_points  # [G, n, 2]
        farthest = torch.maximum(left_top, right_bottom).amax(dim=-1)  # [G, n]
        reach = radius * stride
        positive = (
            (torch.minimum(left_top, right_bottom) > 0).all(dim=-1)
            & (level_points > centers - reach).all(dim=-1)
            & (level_points < centers + reach).all(dim=-1)
            & (farthest >= limits[level])
            & (farthest <= limits[level + 1])
        )
        first = torch.where(positive, rank, num_gt).amin(dim=0)  # [n]
        assigned.append(torch.where(first < num_gt, order[first.clamp(max=num_gt - 1)], -1))
    return torch.cat(assigned)
