"""Two-stage proposals: a box for every token of the encoder (reference: Deformable DETR, appendix A.4)."""

import torch
from torch import Tensor, nn

from ..pyramid import FeaturePyramid, Geometry
from ..structures import EncoderProposals
from ..transformer import box_branch, class_branch

__all__ = ["TwoStageProposals", "gather_tokens", "prior_boxes"]

PRIOR_SIZE = 0.05  # side of the finest level's prior boxes, normalised by the image
BORDER = 0.01  # a prior with a coordinate nearer than this to 0 or 1 is no proposal


class TwoStageProposals(nn.Module):
    """Predicts class and box at every token, relative to a prior box at the token's cell.

    Args:
        embed_dim: channels of the tokens.
        num_classes: number of class logits.
    """

    PUBLISHED_NAMES = [
        ("query_head.transformer.enc_output.{rest}", "proj.{rest}"),
        ("query_head.transformer.enc_output_norm.{rest}", "norm.{rest}"),
        ("query_head.cls_branches.{last}.{rest}", "class_embed.{rest}"),
        ("query_head.reg_branches.{last}.{m}.{rest}", "box_embed.{m}.{rest}"),
    ]

    def __init__(self, embed_dim: int, num_classes: int):
        super().__init__()
        self.proj = nn.Linear(embed_dim, embed_dim)
        self.norm = nn.LayerNorm(embed_dim)
        self.class_embed = class_branch(embed_dim, num_classes)
        self.box_embed = box_branch(embed_dim)
        nn.init.xavier_uniform_(self.proj.weight)
        nn.init.zeros_(self.proj.bias)

    def forward(self, pyramid: FeaturePyramid) -> EncoderProposals:
        """Classes of all tokens. Args: pyramid: the encoder's output."""
        boxes, valid = prior_boxes(pyramid.geometry)
        invalid = ~valid.unsqueeze(-1)  # [B, S, 1]
        embeddings = self.norm(self.proj(pyramid.tokens.masked_fill(invalid, 0.0)))
        return EncoderProposals(
            logits=self.class_embed(embeddings).float(),
            prior_logits=torch.log(boxes / (1 - boxes)).masked_fill(invalid, float("inf")),
            embeddings=embeddings,
        )

    def box_logits(self, proposals: EncoderProposals, index: Tensor | None = None) -> Tensor:
        """The boxes, before the sigmoid, of the tokens [B, Q] ``index``, or of all: [B, Q or S, 4] cxcywh normalised by
        the image size."""
        embeddings, prior_logits = proposals.embeddings, proposals.prior_logits
        if index is not None:
            embeddings, prior_logits = gather_tokens(embeddings, index), gather_tokens(prior_logits, index)
        return self.box_embed(embeddings).float() + prior_logits


def gather_tokens(values: Tensor, index: Tensor) -> Tensor:
    """[B, S, C] and [B, Q] -> [B, Q, C]."""
    return values.gather(1, index.unsqueeze(-1).expand(-1, -1, values.shape[-1]))


def prior_boxes(geometry: Geometry) -> tuple[Tensor, Tensor]:
    """The box at each token's cell and whether it is a proposal at all.

    Returns:
        boxes: [B, S, 4] cxcywh normalised by the valid size; sides of 0.05, doubled from level to level.
        valid: [B, S] bool, False for padding and for priors that reach a border of the image.
    """
    centres = geometry.cell_centres
    levels = zip(centres.split(geometry.level_sizes, dim=1), range(len(geometry.shapes)))
    sides = torch.cat([torch.full_like(x, PRIOR_SIZE * 2.0**level) for x, level in levels], dim=1)
    boxes = torch.cat((centres, sides), dim=-1)
    inside = ((boxes > BORDER) & (boxes < 1 - BORDER)).all(-1)
    return boxes, inside & ~geometry.padding_mask
