"""Plain attention, and self-attention over blocks of queries."""

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["AttentionBlock", "BlockSelfAttention", "attend_in_blocks", "split_heads"]


@dataclass
class AttentionBlock:
    """Consecutive queries of a sequence, and the consecutive keys that they attend to.

    Attributes:
        queries, keys: half-open ranges of the sequence.
        mask: None, or a bool tensor that broadcasts to [B, heads, queries, keys], True where the query of the row may
            attend to the key of the column.
    """

    queries: slice
    keys: slice
    mask: Tensor | None = None


def split_heads(x: Tensor, num_heads: int) -> Tensor:
    """[B, N, C] -> [B, heads, N, C / heads]"""
    return x.unflatten(-1, (num_heads, -1)).transpose(1, 2)


def attend_in_blocks(q: Tensor, k: Tensor, v: Tensor, blocks: list[AttentionBlock], dropout: float) -> Tensor:
    """Scaled dot-product attention in which every block of queries attends to its own range of keys.

    Args:
        q: [B, heads, Q, D] projected queries.
        k, v: [B, heads, S, D] and [B, heads, S, E] projected keys and values, E at most D.
        blocks: their queries follow each other and make up the whole sequence.
        dropout: the probability that an attention weight is zeroed.

    Returns:
        [B, Q, heads * E]
    """
    width = v.shape[-1]
    if width < k.shape[-1]:  # the fused kernels, which keep no weights, take values as wide as keys alone
        v = F.pad(v, (0, k.shape[-1] - width))
    attended = [
        F.scaled_dot_product_attention(
            q[:, :, block.queries],
            k[:, :, block.keys],
            v[:, :, block.keys],
            attn_mask=block.mask,
            dropout_p=dropout,
        )
        for block in blocks
    ]
    return torch.cat(attended, dim=2)[..., :width].transpose(1, 2).flatten(2)


class BlockSelfAttention(nn.Module):
    """Multi-head self-attention in which every block of queries attends to its own range of keys.

    The projections run once over the whole sequence. With one block over all of it, it equals ``nn.MultiheadAttention``
    with query = key = x + position and value = x, and it has the same parameters.

    Args:
        embed_dim: channels of the sequence.
        num_heads: number of heads; it must divide embed_dim.
        dropout: dropout of the attention weights in training.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.in_proj_weight = nn.Parameter(torch.empty(3 * embed_dim, embed_dim))
        self.in_proj_bias = nn.Parameter(torch.zeros(3 * embed_dim))
        self.out_proj = nn.Linear(embed_dim, embed_dim)
        nn.init.xavier_uniform_(self.in_proj_weight)
        nn.init.xavier_uniform_(self.out_proj.weight)
        nn.init.zeros_(self.out_proj.bias)

    def forward(self, x: Tensor, position: Tensor, blocks: list[AttentionBlock]) -> Tensor:
        """
        Args:
            x: [B, Q, C] content.
            position: [B, Q, C], added to queries and keys.
            blocks: their queries follow each other and make up the whole sequence.

        Returns:
            [B, Q, C]
        """
        embed_dim = x.shape[-1]
        query_key = F.linear(x + position, self.in_proj_weight[: 2 * embed_dim], self.in_proj_bias[: 2 * embed_dim])
        value = F.linear(x, self.in_proj_weight[2 * embed_dim :], self.in_proj_bias[2 * embed_dim :])
        q, k, v = (split_heads(part, self.num_heads) for part in (*query_key.chunk(2, dim=-1), value))
        return self.out_proj(attend_in_blocks(q, k, v, blocks, self.dropout if self.training else 0.0))
