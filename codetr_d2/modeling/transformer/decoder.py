"""The deformable decoder: all groups of queries in one pass, boxes refined layer by layer."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers import (
    AttentionBlock,
    BlockSelfAttention,
    MultiScaleDeformableAttention,
    inverse_sigmoid,
    sine_embedding,
)
from ..facts import ClassRows
from ..pyramid import FeaturePyramid
from ..structures import DecoderOutput, QueryGroup
from .perceptrons import FeedForward, box_branch, class_branch, perceptron

__all__ = ["DeformableDecoder", "DeformableDecoderLayer", "attention_blocks"]


class DeformableDecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention and a feed-forward network, each with a residual and a LayerNorm."""

    def __init__(
        self,
        embed_dim: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        ffn_dim: int,
        dropout: float,
        backend: str = "auto",
    ):
        super().__init__()
        self.self_attn = BlockSelfAttention(embed_dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.cross_attn = MultiScaleDeformableAttention(embed_dim, num_heads, num_levels, num_points, backend)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim, dropout)
        self.norm3 = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference_boxes: Tensor,
        blocks: list[AttentionBlock],
        memory: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None,
    ) -> Tensor:
        x = self.norm1(x + self.dropout(self.self_attn(x, position, blocks)))
        attended = self.cross_attn(x + position, memory, reference_boxes, spatial_shapes, padding_mask)
        x = self.norm2(x + self.dropout(attended))
        return self.norm3(x + self.dropout(self.ffn(x)))


class DeformableDecoder(nn.Module):
    """Decoder of Deformable DETR with class and box branches at every layer and iterative box refinement.

    The refined boxes look forward twice: the box of a layer passes its gradient to the branch of the layer before it,
    too, while the reference boxes that steer the attention carry none.

    DINO's decoder differs in two points. ``position_from_boxes``: the position embedding of a query is computed from
    its reference box anew at each layer. ``final_norm``: class and box branches read the states through one LayerNorm
    that all layers share, while the reference boxes are refined from the states without it. Source: DINO (Zhang et al.,
    ICLR 2023), section 3.

    Args:
        embed_dim, num_heads, ffn_dim, dropout: as usual in a transformer.
        num_classes: number of class logits, background not counted.
        num_layers: number of layers.
        num_levels: number of feature levels.
        num_points: sampling points of each head and level.
        position_from_boxes, final_norm: see above.
        reference_eps: bound of the inverse sigmoid on reference boxes.
        activation_checkpointing: recompute the layers in the backward pass to save memory.
        backend: what computes deformable attention, see :func:`codetr_d2.ops.check_backend`.
    """

    PUBLISHED_NAMES = [
        ("query_head.transformer.decoder.layers.{n}.attentions.0.attn.{rest}", "layers.{n}.self_attn.{rest}"),
        ("query_head.transformer.decoder.layers.{n}.attentions.1.{rest}", "layers.{n}.cross_attn.{rest}"),
        ("query_head.transformer.decoder.layers.{n}.ffns.0.layers.0.0.{rest}", "layers.{n}.ffn.linear1.{rest}"),
        ("query_head.transformer.decoder.layers.{n}.ffns.0.layers.1.{rest}", "layers.{n}.ffn.linear2.{rest}"),
        ("query_head.transformer.decoder.layers.{n}.norms.{norm}.{rest}", "layers.{n}.norm{norm}.{rest}"),
        ("query_head.cls_branches.{n}.{rest}", "class_embed.{n}.{rest}"),
        ("query_head.reg_branches.{n}.{m}.{rest}", "box_embed.{n}.{m}.{rest}"),
    ]

    def class_rows(self) -> dict[str, ClassRows]:
        return {f"class_embed.{i}": ClassRows() for i in range(len(self.class_embed))}

    def __init__(
        self,
        *,
        embed_dim: int,
        num_classes: int,
        num_layers: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        ffn_dim: int,
        dropout: float = 0.0,
        position_from_boxes: bool = False,
        final_norm: bool = False,
        reference_eps: float = 1e-5,
        activation_checkpointing: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            DeformableDecoderLayer(embed_dim, num_heads, num_levels, num_points, ffn_dim, dropout, backend)
            for _ in range(num_layers)
        )
        self.class_embed = nn.ModuleList(class_branch(embed_dim, num_classes) for _ in range(num_layers))
        self.box_embed = nn.ModuleList(box_branch(embed_dim) for _ in range(num_layers))
        self.embed_dim = embed_dim
        self.reference_eps = reference_eps
        self.norm = nn.LayerNorm(embed_dim) if final_norm else None
        self.position_head = None
        if position_from_boxes:
            self.position_head = perceptron(2 * embed_dim, embed_dim, embed_dim)
        self.activation_checkpointing = activation_checkpointing

    def forward(self, groups: list[QueryGroup], pyramid: FeaturePyramid) -> list[DecoderOutput]:
        """Decode all groups of queries together.

        Args:
            groups: the queries; each group attends to itself, and where it says so to the one before it.
            pyramid: the encoder's output.

        Returns:
            The predictions of every layer for each group.
        """
        blocks = attention_blocks(groups)
        x = torch.cat([group.content for group in groups], dim=1)  # [B, Q of all groups, C]
        if self.position_head is None:
            position = torch.cat([group.position for group in groups], dim=1)
        reference = torch.cat([group.reference_boxes for group in groups], dim=1)
        geometry = pyramid.geometry
        memory = (pyramid.tokens, geometry.shapes, geometry.value_mask)
        level_scale = geometry.valid_ratios.repeat(1, 1, 2).unsqueeze(1)  # [B, 1, L, 4]

        states, boxes, references = [], [], [reference]
        refined = reference
        for layer, box_embed in zip(self.layers, self.box_embed):
            scaled_reference = reference.unsqueeze(2) * level_scale  # [B, Q, L, 4]
            if self.position_head is not None:
                x0, y0, w0, h0 = scaled_reference[:, :, 0].unbind(-1)
                position = self.position_head(
                    sine_embedding(torch.stack((y0, x0, w0, h0), dim=-1), self.embed_dim // 2)
                )
            args = (x, position, scaled_reference, blocks, *memory)
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, *args, use_reentrant=False)
            else:
                x = layer(*args)
            state = x if self.norm is None else self.norm(x)
            delta = box_embed(x).float()
            own_delta = delta if self.norm is None else box_embed(state).float()
            states.append(state)
            boxes.append((own_delta + inverse_sigmoid(refined, self.reference_eps)).sigmoid())
            # What the next layer's box starts from: its gradient ends at this layer's branch.
            refined = (delta + inverse_sigmoid(reference, self.reference_eps)).sigmoid()
            reference = refined.detach()
            references.append(reference)
        logits = torch.stack([class_embed(x) for class_embed, x in zip(self.class_embed, states)]).float()
        values = (logits, torch.stack(boxes), torch.stack(states), torch.stack(references))
        sizes = [group.num_queries for group in groups]
        return [
            DecoderOutput(*parts, group=group)
            for *parts, group in zip(*(value.split(sizes, dim=2) for value in values), groups)
        ]


def attention_blocks(groups: list[QueryGroup]) -> list[AttentionBlock]:
    """Which queries attend to which, for groups that follow each other in one sequence."""
    blocks, start, previous = [], 0, 0
    for group in groups:
        stop = start + group.num_queries
        context = previous if group.sees_previous else 0
        mask = attention_mask(group, context)
        blocks.append(AttentionBlock(slice(start, stop), slice(start - context, stop), mask))
        start, previous = stop, group.num_queries
    return blocks


def attention_mask(group: QueryGroup, context: int) -> Tensor | None:
    """[B or 1, 1, Q, context + Q] True where a query may attend to a key; None where it may attend to all of them.

    Every slot may attend to itself, so that an empty slot has a finite (and unused) result.
    """
    mask = None
    if group.padding_mask is not None:
        diagonal = torch.eye(group.num_queries, dtype=torch.bool, device=group.padding_mask.device)
        mask = (~group.padding_mask[:, None, None, :]) | diagonal
    if group.attention_mask is not None:
        mask = group.attention_mask[None, None] if mask is None else mask & group.attention_mask
    return mask if mask is None else F.pad(mask, (context, 0), value=True)
