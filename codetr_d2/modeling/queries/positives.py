"""Customised positive queries: the positives of the auxiliary heads become decoder queries (paper, section 3.2)."""

from dataclasses import dataclass

import torch
from torch import Tensor, nn
from torchvision.ops import box_convert

from ...layers import inverse_sigmoid, sine_embedding
from ..structures import PositiveSamples, QueryGroup

__all__ = ["PositiveQueries", "SelectedSamples", "select_samples"]


@dataclass
class SelectedSamples:
    """An equal number of candidates from every image, positives first.

    Attributes:
        boxes, target_boxes: [B, N, 4] xyxy pixels.
        labels: [B, N] int64, ``num_classes`` for background.
        features: [B, N, C].
        padding_mask: [B, N] bool, True at empty slots; None where every slot is taken.
    """

    boxes: Tensor
    target_boxes: Tensor
    labels: Tensor
    features: Tensor
    padding_mask: Tensor | None


def select_samples(
    samples: PositiveSamples, num_classes: int, max_per_head: int, min_per_head: int, padding: str
) -> SelectedSamples:
    """Choose the candidates of an auxiliary head that become queries.

    Every image gets as many slots as the image with the most positives has of them, within the given bounds. An image
    with more positives keeps a random choice; the free slots of one with fewer hold random background candidates
    (``padding="negatives"``, as in the published code) or nothing (``padding="mask"``, as the paper says).
    """
    positives = [torch.nonzero(labels != num_classes).flatten() for labels in samples.labels]
    num_slots = min(max(min_per_head, *(len(p) for p in positives)), max_per_head)
    chosen = []
    for labels, positive in zip(samples.labels, positives):
        if len(positive) > num_slots:
            positive = positive[torch.randperm(len(positive), device=positive.device)[:num_slots]]
        elif padding == "negatives":
            negative = torch.nonzero(labels == num_classes).flatten()
            order = torch.randperm(len(negative), device=negative.device)[: num_slots - len(positive)]
            positive = torch.cat((positive, negative[order]))
        chosen.append(positive)

    def gather(values: list[Tensor], fill: float) -> Tensor:
        rows = []
        for value, labels, index in zip(values, samples.labels, chosen):
            empty = value.new_full((num_slots - len(index), *value.shape[1:]), fill)
            if len(value) < len(labels):  # candidates in a row share a feature
                index = index // (len(labels) // len(value))
            rows.append(torch.cat((value[index], empty)))
        return torch.stack(rows)

    padding_mask = None
    if any(len(index) < num_slots for index in chosen):
        counts = torch.tensor([len(index) for index in chosen], device=samples.boxes[0].device)
        padding_mask = torch.arange(num_slots, device=counts.device) >= counts.unsqueeze(1)
    return SelectedSamples(
        boxes=gather(samples.boxes, 0.0),
        target_boxes=gather(samples.target_boxes, 0.0),
        labels=gather(samples.labels, num_classes),
        features=gather(samples.features, 0.0),
        padding_mask=padding_mask,
    )


class PositiveQueries(nn.Module):
    """Turns the chosen candidates of one auxiliary head into decoder queries (eq. 4 of the paper).

    The sine embedding of the box gives position and content through one linear layer; a linear layer of the
    candidate's feature is added to the content. With ``content_only``, as Co-DINO was published, the embedding gives
    the content alone and features are not used: the decoder makes the position from the box.

    Args:
        embed_dim: channels of the queries and of the candidates' features.
        num_classes: number of classes.
        max_per_head, min_per_head, padding: see :func:`select_samples`.
        content_only: see above.
    """

    PUBLISHED_NAMES = [
        ("query_head.transformer.aux_pos_trans.{head}.{rest}", "box_proj.{rest}"),
        ("query_head.transformer.aux_pos_trans_norm.{head}.{rest}", "box_norm.{rest}"),
        ("query_head.transformer.pos_feats_trans.{head}.{rest}", "feature_proj.{rest}"),
        ("query_head.transformer.pos_feats_norm.{head}.{rest}", "feature_norm.{rest}"),
    ]

    def __init__(
        self,
        embed_dim: int,
        num_classes: int,
        max_per_head: int,
        min_per_head: int,
        padding: str,
        content_only: bool = False,
    ):
        super().__init__()
        self.embed_dim = embed_dim
        self.num_classes = num_classes
        self.max_per_head = max_per_head
        self.min_per_head = min_per_head
        self.padding = padding
        self.content_only = content_only
        out_channels = embed_dim if content_only else 2 * embed_dim
        self.box_proj = nn.Linear(2 * embed_dim, out_channels)
        self.box_norm = nn.LayerNorm(out_channels)
        linears = [self.box_proj]
        if not content_only:
            self.feature_proj = nn.Linear(embed_dim, embed_dim)
            self.feature_norm = nn.LayerNorm(embed_dim)
            # One number that tells the heads apart: the published model broadcasts a scalar over all channels.
            self.head_embed = nn.Parameter(torch.randn(1))
            linears.append(self.feature_proj)
        for linear in linears:
            nn.init.xavier_uniform_(linear.weight)
            nn.init.zeros_(linear.bias)

    def forward(self, samples: PositiveSamples, image_sizes_xyxy: Tensor, name: str) -> QueryGroup:
        """
        Args:
            samples: the candidates of the auxiliary head.
            image_sizes_xyxy: [B, 4] (w, h, w, h) of the images in pixels.
            name: name of the group.
        """
        chosen = select_samples(samples, self.num_classes, self.max_per_head, self.min_per_head, self.padding)
        scale = image_sizes_xyxy.unsqueeze(1)
        boxes = box_convert(chosen.boxes.detach() / scale, "xyxy", "cxcywh")  # may leave [0, 1]
        embedding = sine_embedding(inverse_sigmoid(boxes, 1e-5).sigmoid(), self.embed_dim // 2)
        embedding = self.box_norm(self.box_proj(embedding))
        if self.content_only:
            content, position = embedding, None
        else:
            position, content = embedding.split(self.embed_dim, dim=-1)
            content = content + self.feature_norm(self.feature_proj(chosen.features))
            position = position + self.head_embed
        return QueryGroup(
            name=name,
            content=content,
            position=position,
            reference_boxes=boxes,
            padding_mask=chosen.padding_mask,
            labels=chosen.labels,
            target_boxes=box_convert(chosen.target_boxes / scale, "xyxy", "cxcywh"),
        )
