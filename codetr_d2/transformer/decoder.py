"""The deformable decoder: all groups of queries in one pass, boxes refined layer by layer."""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ..layers import BlockSelfAttention, MultiScaleDeformableAttention, inverse_sigmoid
from ..structures import DecoderOutput, FeaturePyramid, QueryGroup
from .encoder import FeedForward

__all__ = ["DeformableDecoder", "DeformableDecoderLayer"]


class DeformableDecoderLayer(nn.Module):
    """Self-attention, deformable cross-attention and a feed-forward network, each with a residual and a LayerNorm."""

    def __init__(self, embed_dim: int, num_heads: int, num_levels: int, num_points: int, ffn_dim: int, dropout: float):
        super().__init__()
        self.self_attn = BlockSelfAttention(embed_dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.cross_attn = MultiScaleDeformableAttention(embed_dim, num_heads, num_levels, num_points)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim, dropout)
        self.norm3 = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference_boxes: Tensor,
        block_sizes: list[int],
        block_masks: list[Tensor | None],
        memory: Tensor,
        spatial_shapes: Tensor,
        level_start_index: Tensor,
        padding_mask: Tensor,
    ) -> Tensor:
        x = self.norm1(x + self.dropout(self.self_attn(x, position, block_sizes, block_masks)))
        attended = self.cross_attn(
            x + position, memory, reference_boxes, spatial_shapes, level_start_index, padding_mask
        )
        x = self.norm2(x + self.dropout(attended))
        return self.norm3(x + self.dropout(self.ffn(x)))


class DeformableDecoder(nn.Module):
    """Decoder of Deformable DETR with class and box branches at every layer and iterative box refinement.

    The refined boxes look forward twice: the box of a layer passes its gradient to the branch of the layer before it,
    too, while the reference boxes that steer the attention carry none.

    Args:
        embed_dim, num_heads, ffn_dim, dropout: as usual in a transformer.
        num_classes: number of class logits, background not counted.
        num_layers: number of layers.
        num_levels: number of feature levels.
        num_points: sampling points of each head and level.
        activation_checkpointing: recompute the layers in the backward pass to save memory.
    """

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
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.layers = nn.ModuleList(
            DeformableDecoderLayer(embed_dim, num_heads, num_levels, num_points, ffn_dim, dropout)
            for _ in range(num_layers)
        )
        self.class_embed = nn.ModuleList(class_branch(embed_dim, num_classes) for _ in range(num_layers))
        self.box_embed = nn.ModuleList(box_branch(embed_dim) for _ in range(num_layers))
        self.activation_checkpointing = activation_checkpointing

    def forward(self, groups: list[QueryGroup], pyramid: FeaturePyramid) -> list[DecoderOutput]:
        """Decode all groups of queries together.

        Args:
            groups: the queries; self-attention stays inside each group.
            pyramid: the encoder's output.

        Returns:
            The predictions of every layer for each group.
        """
        block_sizes = [group.num_queries for group in groups]
        block_masks = [attention_mask(group.padding_mask) for group in groups]
        x = torch.cat([group.content for group in groups], dim=1)  # [B, Q of all groups, C]
        position = torch.cat([group.position for group in groups], dim=1)
        reference = torch.cat([group.reference_boxes for group in groups], dim=1)
        memory = (pyramid.tokens, pyramid.spatial_shapes, pyramid.level_start_index, pyramid.padding_mask)
        level_scale = pyramid.valid_ratios.repeat(1, 1, 2).unsqueeze(1)  # [B, 1, L, 4]

        states, boxes = [], []
        refined = reference
        for layer, box_embed in zip(self.layers, self.box_embed):
            args = (x, position, reference.unsqueeze(2) * level_scale, block_sizes, block_masks, *memory)
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, *args, use_reentrant=False)
            else:
                x = layer(*args)
            delta = box_embed(x).float()
            states.append(x)
            boxes.append((delta + inverse_sigmoid(refined, REFERENCE_EPS)).sigmoid())
            # The same values, but the gradient ends at this layer's branch: what the next layer's box starts from.
            refined = (delta + inverse_sigmoid(reference, REFERENCE_EPS)).sigmoid()
            reference = refined.detach()
        logits = torch.stack([class_embed(x) for class_embed, x in zip(self.class_embed, states)]).float()
        states, boxes = torch.stack(states), torch.stack(boxes)
        return [
            DecoderOutput(*parts, group=group)
            for *parts, group in zip(*(t.split(block_sizes, dim=2) for t in (logits, boxes, states)), groups)
        ]


REFERENCE_EPS = 1e-5  # of the inverse sigmoid on reference boxes


def attention_mask(padding_mask: Tensor | None) -> Tensor | None:
    """[B, Q] True at empty slots -> [B, 1, Q, Q] True where a query may attend to a key.

    Every slot may attend to itself, so that an empty slot has a finite (and unused) result.
    """
    if padding_mask is None:
        return None
    diagonal = torch.eye(padding_mask.shape[1], dtype=torch.bool, device=padding_mask.device)
    return (~padding_mask[:, None, None, :]) | diagonal


def class_branch(embed_dim: int, num_classes: int) -> nn.Linear:
    """Linear classifier whose bias starts every class at a probability of 1 %."""
    linear = nn.Linear(embed_dim, num_classes)
    nn.init.constant_(linear.bias, -4.59511985013459)  # -log((1 - 0.01) / 0.01)
    return linear


def box_branch(embed_dim: int) -> nn.Sequential:
    """Three-layer perceptron to the four box logits, which start at zero."""
    branch = nn.Sequential(
        nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, embed_dim), nn.ReLU(), nn.Linear(embed_dim, 4)
    )
    nn.init.zeros_(branch[-1].weight)
    nn.init.zeros_(branch[-1].bias)
    return branch
