"""The deformable encoder: refines the tokens of all feature levels together."""

from collections.abc import Sequence

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers import MultiScaleDeformableAttention
from ..pyramid import FeaturePyramid
from .perceptrons import FeedForward

__all__ = ["DeformableEncoder", "DeformableEncoderLayer"]


class DeformableEncoderLayer(nn.Module):
    """Deformable self-attention and a feed-forward network, each with a residual connection and then a LayerNorm."""

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
        self.self_attn = MultiScaleDeformableAttention(embed_dim, num_heads, num_levels, num_points, backend)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim, dropout)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        reference_points: Tensor,
        spatial_shapes: Sequence[tuple[int, int]],
        padding_mask: Tensor | None,
    ) -> Tensor:
        attended = self.self_attn(x + position, x, reference_points, spatial_shapes, padding_mask)
        x = self.norm1(x + self.dropout(attended))
        return self.norm2(x + self.dropout(self.ffn(x)))


class DeformableEncoder(nn.Module):
    """Encoder of Deformable DETR over a feature pyramid.

    Args:
        embed_dim, num_heads, ffn_dim, dropout: as usual in a transformer.
        num_layers: number of layers.
        num_levels: number of feature levels.
        num_points: sampling points of each head and level.
        activation_checkpointing: recompute the layers in the backward pass to save memory.
        backend: what computes deformable attention, see :func:`codetr_d2.ops.check_backend`.
    """

    PUBLISHED_NAMES = [
        ("query_head.transformer.level_embeds", "level_embed"),
        ("query_head.transformer.encoder.layers.{n}.attentions.0.{rest}", "layers.{n}.self_attn.{rest}"),
        ("query_head.transformer.encoder.layers.{n}.ffns.0.layers.0.0.{rest}", "layers.{n}.ffn.linear1.{rest}"),
        ("query_head.transformer.encoder.layers.{n}.ffns.0.layers.1.{rest}", "layers.{n}.ffn.linear2.{rest}"),
        ("query_head.transformer.encoder.layers.{n}.norms.{norm}.{rest}", "layers.{n}.norm{norm}.{rest}"),
    ]

    def __init__(
        self,
        *,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        num_levels: int,
        num_points: int,
        ffn_dim: int,
        dropout: float = 0.0,
        activation_checkpointing: bool = False,
        backend: str = "auto",
    ):
        super().__init__()
        self.level_embed = nn.Parameter(torch.randn(num_levels, embed_dim))
        self.layers = nn.ModuleList(
            DeformableEncoderLayer(embed_dim, num_heads, num_levels, num_points, ffn_dim, dropout, backend)
            for _ in range(num_layers)
        )
        self.activation_checkpointing = activation_checkpointing

    def forward(self, pyramid: FeaturePyramid, position: Tensor) -> Tensor:
        """
        Args:
            pyramid: the neck's output.
            position: [B, S, C] position encoding of the tokens.

        Returns:
            [B, S, C] refined tokens.
        """
        geometry = pyramid.geometry
        level_embed = [x.expand(size, -1) for x, size in zip(self.level_embed, geometry.level_sizes)]
        position = position + torch.cat(level_embed)
        x = pyramid.tokens
        for layer in self.layers:
            args = (x, position, geometry.reference_points, geometry.shapes, geometry.value_mask)
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, *args, use_reentrant=False)
            else:
                x = layer(*args)
        return x
