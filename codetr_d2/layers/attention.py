"""Plain self-attention over blocks of queries that do not see each other."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn

__all__ = ["BlockSelfAttention"]


class BlockSelfAttention(nn.Module):
    """Multi-head self-attention in which every block of the sequence attends to itself only.

    The projections run once over the whole sequence. With one block it equals ``nn.MultiheadAttention`` with
    query = key = x + position and value = x, and it has the same parameters.

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

    def forward(self, x: Tensor, position: Tensor, block_sizes: list[int], masks: list[Tensor | None]) -> Tensor:
        """
        Args:
            x: [B, Q, C] content.
            position: [B, Q, C], added to queries and keys.
            block_sizes: lengths of the blocks; they sum to Q.
            masks: for each block None, or a bool tensor that broadcasts to [B, heads, q, q], True where the query of
                the row may attend to the key of the column.

        Returns:
            [B, Q, C]
        """
        embed_dim = x.shape[-1]
        query_key = F.linear(x + position, self.in_proj_weight[: 2 * embed_dim], self.in_proj_bias[: 2 * embed_dim])
        value = F.linear(x, self.in_proj_weight[2 * embed_dim :], self.in_proj_bias[2 * embed_dim :])
        # [B, Q, 3C] -> [B, 3 * heads, Q, C / heads]
        heads = torch.cat((query_key, value), dim=-1).unflatten(-1, (3 * self.num_heads, -1)).transpose(1, 2)
        dropout = self.dropout if self.training else 0.0
        blocks = []
        for block, mask in zip(heads.split(block_sizes, dim=2), masks):
            q, k, v = block.chunk(3, dim=1)
            blocks.append(F.scaled_dot_product_attention(q, k, v, attn_mask=mask, dropout_p=dropout))
        return self.out_proj(torch.cat(blocks, dim=2).transpose(1, 2).flatten(2))
