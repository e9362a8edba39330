"""The attention of Conditional-DETR's decoder: content and position have projections of their own."""

from torch import Tensor, cat, nn

from .attention import AttentionBlock, attend_in_blocks, split_heads

__all__ = ["ConditionalCrossAttention", "ConditionalSelfAttention"]


class ConditionalSelfAttention(nn.Module):
    """Multi-head self-attention over blocks of queries; projected positions are added to projected contents.

    Source: Conditional DETR (Meng et al., ICCV 2021).

    Args:
        embed_dim: channels of the sequence.
        num_heads: number of heads; it must divide embed_dim.
        dropout: dropout of the attention weights in training.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_content = _linear(embed_dim)
        self.query_position = _linear(embed_dim)
        self.key_content = _linear(embed_dim)
        self.key_position = _linear(embed_dim)
        self.value = _linear(embed_dim)
        self.out_proj = _linear(embed_dim)

    def forward(self, x: Tensor, position: Tensor, blocks: list[AttentionBlock]) -> Tensor:
        """
        Args:
            x: [B, Q, C] content.
            position: [B, Q, C].
            blocks: their queries follow each other and make up the whole sequence.

        Returns:
            [B, Q, C]
        """
        q = self.query_content(x) + self.query_position(position)
        k = self.key_content(x) + self.key_position(position)
        q, k, v = (split_heads(part, self.num_heads) for part in (q, k, self.value(x)))
        return self.out_proj(attend_in_blocks(q, k, v, blocks, self.dropout if self.training else 0.0))


class ConditionalCrossAttention(nn.Module):
    """Multi-head attention of queries to a memory, whose weights are a content part plus a spatial part.

    In every head, queries and keys are the content and the position side by side, so that their product is the sum of
    that of the contents and that of the positions. Source: Conditional DETR, section 3.2.

    Args:
        embed_dim: channels of queries and memory.
        num_heads: number of heads; it must divide embed_dim.
        dropout: dropout of the attention weights in training.
        adds_position: positions are also added to the contents, as in the first layer of a decoder, whose queries have
            no content of their own yet.
    """

    def __init__(self, embed_dim: int, num_heads: int, dropout: float = 0.0, adds_position: bool = False):
        super().__init__()
        self.num_heads = num_heads
        self.dropout = dropout
        self.query_content = _linear(embed_dim)
        self.query_position = _linear(embed_dim) if adds_position else None
        self.query_spatial = _linear(embed_dim)
        self.key_content = _linear(embed_dim)
        self.key_position = _linear(embed_dim)
        self.value = _linear(embed_dim)
        self.out_proj = _linear(embed_dim)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        spatial_query: Tensor,
        memory: Tensor,
        memory_position: Tensor,
        mask: Tensor | None,
    ) -> Tensor:
        """
        Args:
            x: [B, Q, C] content of the queries.
            position: [B, Q, C] position of the queries, which is added to their content (see the class) or not used.
            spatial_query: [B, Q, C] what is compared with the memory's positions.
            memory: [B, S, C].
            memory_position: [B, S, C].
            mask: None, or bool that broadcasts to [B, heads, Q, S], True where a query may attend.

        Returns:
            [B, Q, C]
        """
        q, k = self.queries_and_keys(x, position, spatial_query, memory, memory_position)
        v = split_heads(self.value(memory), self.num_heads)
        everything = AttentionBlock(slice(None), slice(None), mask)
        return self.out_proj(attend_in_blocks(q, k, v, [everything], self.dropout if self.training else 0.0))

    def queries_and_keys(
        self, x: Tensor, position: Tensor, spatial_query: Tensor, memory: Tensor, memory_position: Tensor
    ) -> tuple[Tensor, Tensor]:
        """What is compared, [B, heads, Q, 2C / heads] and [B, heads, S, 2C / heads]. Args: see :meth:`forward`."""
        q, k = self.query_content(x), self.key_content(memory)
        spatial_key = self.key_position(memory_position)
        if self.query_position is not None:
            q, k = q + self.query_position(position), k + spatial_key
        parts = (q, self.query_spatial(spatial_query), k, spatial_key)
        q, spatial_q, k, spatial_k = (split_heads(part, self.num_heads) for part in parts)
        return cat((q, spatial_q), dim=-1), cat((k, spatial_k), dim=-1)


def _linear(embed_dim: int) -> nn.Linear:
    linear = nn.Linear(embed_dim, embed_dim)
    nn.init.xavier_uniform_(linear.weight)
    nn.init.zeros_(linear.bias)
    return linear
