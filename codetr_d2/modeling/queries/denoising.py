"""Contrastive denoising: noised ground truth as decoder queries (DINO, Zhang et al., ICLR 2023, section 3.3)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from ...layers import inverse_sigmoid
from ..facts import ClassRows
from ..structures import QueryGroup, Targets

__all__ = ["ContrastiveDenoising", "DenoisingNoise"]

# Of the inverse sigmoid on the noised boxes, which keeps them away from 0 and 1.
REFERENCE_EPS = 1e-3


@dataclass
class DenoisingNoise:
    """Random draws for B images, N noised copies of the ground truth, a positive and a negative half, G objects.

    Attributes:
        label_draws: [B, N, 2, G] uniform in [0, 1): a label is replaced where this is below half of the label noise.
        new_labels: [B, N, 2, G] int64, the labels that take their place.
        signs: [B, N, 2, G, 4] -1 or 1, the direction in which each coordinate of the corners moves.
        parts: [B, N, 2, G, 4] uniform in [0, 1): how far it moves. Negatives move by one more than this.
    """

    label_draws: Tensor
    new_labels: Tensor
    signs: Tensor
    parts: Tensor

    @classmethod
    def draw(cls, shape: tuple[int, int, int, int], num_classes: int, device: torch.device) -> "DenoisingNoise":
        """New draws for the shape [B, N, 2, G]."""
        return cls(
            label_draws=torch.rand(shape, device=device),
            new_labels=torch.randint(num_classes, shape, device=device),
            signs=torch.randint(2, (*shape, 4), device=device) * 2.0 - 1.0,
            parts=torch.rand((*shape, 4), device=device),
        )


class ContrastiveDenoising(nn.Module):
    """Queries from noised ground truth: positives to be restored, and negatives to be told from them.

    Every image gets N copies of its ground truth, each with G positives and then G negatives, where G is the largest
    number of objects in the batch and N such that there are about ``num_queries`` positives. Slots past an image's own
    objects are empty: they are trained as background. A copy sees itself and the matching queries.

    Args:
        embed_dim: channels of the queries.
        num_classes: number of classes.
        num_queries: number of positives of each image that is aimed at.
        label_noise: twice the share of the labels that are replaced by random ones.
        box_noise: how far the corners of positives move at most, in halves of the box's side; negatives move farther,
            up to twice that.
    """

    def class_rows(self) -> dict[str, ClassRows]:
        return {"label_embed": ClassRows()}

    def __init__(self, embed_dim: int, num_classes: int, num_queries: int, label_noise: float, box_noise: float):
        super().__init__()
        self.num_classes = num_classes
        self.num_queries = num_queries
        self.label_noise = label_noise
        self.box_noise = box_noise
        self.label_embed = nn.Embedding(num_classes, embed_dim)

    def forward(self, targets: Targets, noise: DenoisingNoise | None = None) -> QueryGroup:
        """
        Args:
            targets: the ground truth.
            noise: draws to use instead of new ones.

        Returns:
            The group, to follow the matching queries; positions are the decoder's to make.
        """
        batch_size, device = len(targets.labels), targets.labels.device
        # Without any object in the batch there is one empty slot, so that the embedding has a (zero) gradient.
        num_objects = max(*targets.num_targets, 1)
        num_copies = max(1, self.num_queries // num_objects) if max(targets.num_targets) > 0 else 1
        shape = (batch_size, num_copies, 2, num_objects)
        noise = noise or DenoisingNoise.draw(shape, self.num_classes, device)
        counts = torch.tensor(targets.num_targets, device=device)
        taken = (torch.arange(num_objects, device=device) < counts[:, None])[:, None, None].expand(shape)
        labels, boxes = targets.labels, targets.boxes
        if max(targets.num_targets) == 0:
            labels, boxes = labels.new_zeros((batch_size, 1)), boxes.new_zeros((batch_size, 1, 4))
        labels = labels[:, None, None].expand(shape)
        boxes = boxes[:, None, None].expand(*shape, 4)

        noised_labels = torch.where(noise.label_draws < self.label_noise / 2, noise.new_labels, labels)
        content = self.label_embed(noised_labels) * taken.unsqueeze(-1)

        half_sides = boxes[..., 2:].repeat(1, 1, 1, 1, 2) / 2
        parts = noise.parts + noise.parts.new_tensor([0.0, 1.0])[:, None, None]  # [B, N, 2, G, 4]
        corners = box_convert(boxes, "cxcywh", "xyxy") + noise.signs * parts * half_sides * self.box_noise
        noised_boxes = box_convert(corners.clamp(0, 1), "xyxy", "cxcywh")
        box_logits = inverse_sigmoid(noised_boxes, REFERENCE_EPS) * taken.unsqueeze(-1)

        is_positive = taken & (torch.arange(2, device=device) == 0)[:, None]
        copies = torch.arange(num_copies, device=device).repeat_interleave(2 * num_objects)
        return QueryGroup(
            name="_dn",
            content=content.flatten(1, 3),
            reference_boxes=box_logits.sigmoid().flatten(1, 3),
            attention_mask=copies[:, None] == copies,
            sees_previous=True,
            labels=torch.where(is_positive, labels, self.num_classes).flatten(1),
            target_boxes=boxes.flatten(1, 3),
        )
