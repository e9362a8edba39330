"""The decoder of Conditional DETR and DAB-DETR: attention to one level, with a part for content and one for space.

All groups of queries go through it in one pass.
"""

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...layers import (
    AttentionBlock,
    ConditionalCrossAttention,
    ConditionalSelfAttention,
    SinePositionEncoding,
    inverse_sigmoid,
    sine_embedding,
)
from ..facts import ClassRows
from ..pyramid import FeaturePyramid
from ..structures import DecoderOutput, QueryGroup
from .decoder import attention_blocks
from .perceptrons import FeedForward, box_branch, class_branch, perceptron
from .plain_encoder import attention_to_tokens, positions_of_tokens

__all__ = ["ConditionalDecoder", "ConditionalDecoderLayer"]

REFERENCE_EPS = 1e-5  # of the inverse sigmoid on reference boxes
# Least side of an anchor box, as a share of the image, where attention is divided by it: empty slots have boxes of 0.
MIN_SIDE = 1e-3


class ConditionalDecoderLayer(nn.Module):
    """Self-attention, conditional cross-attention and a feed-forward network, each with a residual and a LayerNorm."""

    def __init__(self, embed_dim: int, num_heads: int, ffn_dim: int, dropout: float, is_first: bool, prelu: bool):
        super().__init__()
        self.self_attn = ConditionalSelfAttention(embed_dim, num_heads, dropout)
        self.norm1 = nn.LayerNorm(embed_dim)
        self.cross_attn = ConditionalCrossAttention(embed_dim, num_heads, dropout, adds_position=is_first)
        self.norm2 = nn.LayerNorm(embed_dim)
        self.ffn = FeedForward(embed_dim, ffn_dim, dropout, prelu)
        self.norm3 = nn.LayerNorm(embed_dim)
        self.dropout = nn.Dropout(dropout)

    def forward(
        self,
        x: Tensor,
        position: Tensor,
        spatial_query: Tensor,
        blocks: list[AttentionBlock],
        memory: Tensor,
        memory_position: Tensor,
        memory_mask: Tensor | None,
    ) -> Tensor:
        x = self.norm1(x + self.dropout(self.self_attn(x, position, blocks)))
        attended = self.cross_attn(x, position, spatial_query, memory, memory_position, memory_mask)
        x = self.norm2(x + self.dropout(attended))
        return self.norm3(x + self.dropout(self.ffn(x)))


class ConditionalDecoder(nn.Module):
    """Decoder of Conditional DETR: a query looks around its reference point, which stays where it is.

    The sine embedding of the point, from the second layer on scaled by a perceptron of the content, is compared with
    the memory's positions. Boxes are predicted around the point by branches that all layers share, from the states
    behind one LayerNorm that they share too. The sides of reference boxes are not used. Source: Conditional DETR (Meng
    et al., ICCV 2021), section 3.

    DAB-DETR's decoder (``anchor_boxes``) has boxes in the place of the points: they are refined layer by layer, as in
    :class:`DeformableDecoder` the box of a layer passes its gradient to the layer before it, too, and the boxes that
    steer the attention carry none but in the first layer; the position of a query is computed from its box anew at each
    layer; and the spatial part of the attention is scaled by a predicted size over that of the box, width and height
    apart. Its activation is a PReLU. Source: DAB-DETR (Liu et al., ICLR 2022), section 4.

    Args:
        position_encoding: of the memory's cells.
        embed_dim, num_heads, ffn_dim, dropout: as usual in a transformer.
        num_classes: number of class logits, background not counted.
        num_layers: number of layers.
        anchor_boxes: see above.
        activation_checkpointing: recompute the layers in the backward pass to save memory.
    """

    def class_rows(self) -> dict[str, ClassRows]:
        return {"class_embed": ClassRows()}

    def __init__(
        self,
        *,
        position_encoding: SinePositionEncoding,
        embed_dim: int,
        num_classes: int,
        num_layers: int,
        num_heads: int,
        ffn_dim: int,
        dropout: float = 0.0,
        anchor_boxes: bool = False,
        activation_checkpointing: bool = False,
    ):
        super().__init__()
        self.position_encoding = position_encoding
        self.layers = nn.ModuleList(
            ConditionalDecoderLayer(embed_dim, num_heads, ffn_dim, dropout, is_first=i == 0, prelu=anchor_boxes)
            for i in range(num_layers)
        )
        self.final_norm = nn.LayerNorm(embed_dim)
        self.class_embed = class_branch(embed_dim, num_classes)
        self.box_embed = box_branch(embed_dim)
        self.spatial_scale = perceptron(embed_dim, embed_dim, embed_dim) if num_layers > 1 else None
        if anchor_boxes:
            self.position_head = perceptron(2 * embed_dim, embed_dim, embed_dim)
            self.size_head = perceptron(embed_dim, embed_dim, 2)
        self.embed_dim = embed_dim
        self.anchor_boxes = anchor_boxes
        self.activation_checkpointing = activation_checkpointing

    def forward(self, groups: list[QueryGroup], pyramid: FeaturePyramid) -> list[DecoderOutput]:
        """Decode all groups of queries together.

        Args:
            groups: the queries; each group attends to itself, and where it says so to the one before it. They have
                positions, unless these come from anchor boxes.
            pyramid: the encoder's output, a single level.

        Returns:
            The predictions of every layer for each group.
        """
        blocks = attention_blocks(groups)
        memory = (
            pyramid.tokens,
            positions_of_tokens(self.position_encoding, pyramid),
            attention_to_tokens(pyramid),
        )
        x = torch.cat([group.content for group in groups], dim=1)  # [B, Q of all groups, C]
        reference = torch.cat([group.reference_boxes for group in groups], dim=1)
        if not self.anchor_boxes:
            position = torch.cat([group.position for group in groups], dim=1)
            # The logit of a half is zero: what the branch gives is the side itself.
            reference = torch.cat((reference[..., :2], torch.full_like(reference[..., 2:], 0.5)), dim=-1)

        states, starts, references = [], [], [reference]
        start = reference
        for i, layer in enumerate(self.layers):
            # As in the memory's positions, y comes before x.
            embedding = sine_embedding(reference[..., :2].flip(-1), self.embed_dim // 2)  # [B, Q, C]
            spatial_query = embedding if i == 0 else embedding * self.spatial_scale(x)
            if self.anchor_boxes:
                sides = sine_embedding(reference[..., 2:], self.embed_dim // 2)
                position = self.position_head(torch.cat((embedding, sides), dim=-1))
                ratio = self.size_head(x).float().sigmoid() / reference[..., 2:].clamp(min=MIN_SIDE)  # of (w, h)
                spatial_query = (spatial_query.unflatten(-1, (2, -1)) * ratio.flip(-1).unsqueeze(-1)).flatten(-2)
            args = (x, position, spatial_query, blocks, *memory)
            if self.activation_checkpointing and self.training:
                x = checkpoint(layer, *args, use_reentrant=False)
            else:
                x = layer(*args)
            states.append(self.final_norm(x))
            starts.append(start)
            if self.anchor_boxes:
                # What the next layer's box starts from: its gradient ends at this layer's branch.
                start = (self.box_embed(x).float() + inverse_sigmoid(reference, REFERENCE_EPS)).sigmoid()
                reference = start.detach()
            references.append(reference)
        states = torch.stack(states)
        logits = self.class_embed(states).float()
        boxes = (self.box_embed(states).float() + inverse_sigmoid(torch.stack(starts), REFERENCE_EPS)).sigmoid()
        values = (logits, boxes, states, torch.stack(references))
        sizes = [group.num_queries for group in groups]
        return [
            DecoderOutput(*parts, group=group)
            for *parts, group in zip(*(value.split(sizes, dim=2) for value in values), groups)
        ]
