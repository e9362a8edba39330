"""One-to-one matching of predictions with ground truth."""

import torch
from scipy.optimize import linear_sum_assignment
from torch import Tensor
from torchvision.ops import box_convert

from ...layers import pairwise_giou

__all__ = ["HungarianMatcher"]


class HungarianMatcher:
    """Minimum-cost one-to-one matching, for any number of prediction sets with a single copy to the CPU.

    The cost is ``cost_cls`` times the focal cost of the class + ``cost_box`` times the L1 distance of the normalised
    cxcywh boxes + ``cost_giou`` times minus the generalised IoU (reference: Deformable DETR).
    """

    def __init__(self, cost_cls: float, cost_box: float, cost_giou: float, alpha: float = 0.25, gamma: float = 2.0):
        self.cost_cls = cost_cls
        self.cost_box = cost_box
        self.cost_giou = cost_giou
        self.alpha = alpha
        self.gamma = gamma

    @torch.no_grad()
    def cost(
        self, logits: Tensor, boxes: Tensor, labels: Tensor, target_boxes: Tensor, image_sizes_xyxy: Tensor
    ) -> Tensor:
        """Cost of every pair of prediction and ground truth.

        Args:
            logits: [layers, B, Q, K].
            boxes: [layers, B, Q, 4] cxcywh normalised.
            labels: [B, G] int64 classes of the ground truth, padded with any class.
            target_boxes: [B, G, 4] cxcywh normalised, padded with anything.
            image_sizes_xyxy: [B, 4] (w, h, w, h) in pixels.

        Returns:
            [layers, B, Q, G]
        """
        index = labels[None, :, None, :].expand(*logits.shape[:3], -1)
        prob = logits.gather(-1, index).sigmoid()  # [layers, B, Q, G]
        positive = self.alpha * (1 - prob) ** self.gamma * -(prob + 1e-12).log()
        negative = (1 - self.alpha) * prob**self.gamma * -(1 - prob + 1e-12).log()
        distance = torch.cdist(boxes, target_boxes.unsqueeze(0).expand(len(boxes), -1, -1, -1), p=1)
        scale = image_sizes_xyxy[:, None, :]
        giou = pairwise_giou(
            box_convert(boxes, "cxcywh", "xyxy") * scale, (box_convert(target_boxes, "cxcywh", "xyxy") * scale)[None]
        )
        return self.cost_cls * (positive - negative) + self.cost_box * distance - self.cost_giou * giou

    @torch.no_grad()
    def match(self, costs: list[Tensor], num_targets: list[int]) -> list[Tensor]:
        """Solve the assignment problem of every layer and image of every set.

        Args:
            costs: for each set of predictions the [layers, B, Q, G] costs.
            num_targets: the number of ground truths of each image, at most G.

        Returns:
            For each set the [layers, B, G] int64 index of the query matched with each ground truth, -1 where there is
            none: past ``num_targets``, or when there are fewer queries than ground truths. On the device of the costs.
        """
        shapes = [cost.shape for cost in costs]
        # Non-finite predictions are reported by the loss; the solver must only not stumble over them.
        flat = torch.cat([cost.flatten() for cost in costs]).nan_to_num(nan=1e8, posinf=1e8, neginf=-1e8).cpu()
        matches = []
        for cost, shape in zip(flat.split([shape.numel() for shape in shapes]), shapes):
            cost = cost.view(shape).numpy()
            match = torch.full((shape[0], shape[1], shape[3]), -1, dtype=torch.int64)
            for layer in range(shape[0]):
                for image, n in enumerate(num_targets):
                    query, target = linear_sum_assignment(cost[layer, image, :, :n])
                    match[layer, image, torch.as_tensor(target)] = torch.as_tensor(query)
            matches.append(match)
        sizes = [match.numel() for match in matches]
        on_device = torch.cat([match.flatten() for match in matches]).to(costs[0].device)
        return [part.view(match.shape) for part, match in zip(on_device.split(sizes), matches)]
