"""The plain encoder: every token of one feature level attends to all of them."""

from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers import AttentionBlock, BlockSelfAttention, SinePositionEncoding
from ..pyramid import FeaturePyramid
from .perceptrons import FeedForward, perceptron

__all__ = ["PlainEncoder", "PlainEncoderLayer", "attention_to_tokens", "positions_of_tokens"]


class PlainEncoderLayer(nn.Module):
    """Self-attention and a feed-forward network, each with a residual connection and then a LayerNorm."""

    def __init__(self, embed_dim: int, num_heads: int, ffn_dim: int, dropout: float, prelu: bool):
        super().__init__()
        self.self_attn = BlockSelfAttention(embed_dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim, dropout, prelu)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor, position: Tensor, blocks: list[AttentionBlock]) -> Tensor:
        x = self.norm1(x + self.dropout(self.self_attn(x, position, blocks)))
        return self.norm2(x + self.dropout(self.ffn(x)))


class PlainEncoder(nn.Module):
    """Encoder of DETR over one feature level. Each layer adds the position to queries and keys.

    DAB-DETR's encoder differs in two points. ``scales_position``: the position is multiplied, channel by channel, by a
    perceptron of the content. ``prelu``: the activation is a PReLU. Source: DAB-DETR (Liu et al., ICLR 2022).

    Args:
        position_encoding: of the cells.
        embed_dim, num_heads, ffn_dim, dropout: as usual in a transformer.
        num_layers: number of layers.
        scales_position, prelu: see above.
        activation_checkpointing: recompute the layers in the backward pass to save memory.
    """

    def __init__(
        self,
        *,
        position_encoding: SinePositionEncoding,
        embed_dim: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float = 0.0,
        scales_position: bool = False,
        prelu: bool = False,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.position_encoding = position_encoding
        self.layers = nn.ModuleList(
            PlainEncoderLayer(embed_dim, num_heads, ffn_dim, dropout, prelu) for _ in range(num_layers)
        )
        self.position_scale = perceptron(embed_dim, embed_dim, embed_dim) if scales_position else None
        self.activation_checkpointing = activation_checkpointing

    def forward(self, pyramid: FeaturePyramid) -> Tensor:
        """The neck's output, a single level -> [B, S, C] refined tokens."""
        position = positions_of_tokens(self.position_encoding, pyramid)
        blocks = [AttentionBlock(slice(None), slice(None), attention_to_tokens(pyramid))]
        x = pyramid.tokens
        for layer in self.layers:
            scaled = position if self.position_scale is None else position * self.position_scale(x)
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, x, scaled, blocks, use_reentrant=False)
            else:
                x = layer(x, scaled, blocks)
        return x


def positions_of_tokens(position_encoding: SinePositionEncoding, pyramid: FeaturePyramid) -> Tensor:
    """[B, S, C] position encoding of the tokens of a single level."""
    [padding] = pyramid.geometry.level_padding
    return position_encoding(padding, pyramid.geometry.is_padded)


def attention_to_tokens(pyramid: FeaturePyramid) -> Tensor | None:
    """[B, 1, 1, S] bool, True where a token is no padding and may be attended to; None where all may."""
    mask = pyramid.geometry.value_mask
    return None if mask is None else ~mask[:, None, None]
