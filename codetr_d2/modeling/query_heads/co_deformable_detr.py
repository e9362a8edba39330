"""The query head of Co-Deformable-DETR."""

import dataclasses

from detectron2.config import CfgNode, configurable
from torch import Tensor, nn

from ...layers import SinePositionEncoding, sine_embedding
from ..facts import ClassRows
from ..queries import gather_tokens
from ..structures import DecoderOutput, EncoderProposals, QueryGroup
from .base import QUERY_HEAD_REGISTRY
from .two_stage import TwoStageQueryHead, two_stage_arguments

__all__ = ["CoDeformableDETRHead"]


@QUERY_HEAD_REGISTRY.register()
class CoDeformableDETRHead(TwoStageQueryHead):
    """Deformable DETR with two stages, mixed query selection, box refinement and looking forward twice.

    The encoder learns objectness at every token. The position of a query is made once, from its proposal's box.
    """

    PUBLISHED_NAMES = [
        *TwoStageQueryHead.PUBLISHED_NAMES,
        ("query_head.query_embedding.weight", "query_content.weight"),
        ("query_head.transformer.pos_trans.{rest}", "box_proj.{rest}"),
        ("query_head.transformer.pos_trans_norm.{rest}", "box_norm.{rest}"),
    ]
    TELLING_PARAMETER = "box_proj.weight"

    @configurable
    def __init__(self, **kwargs):
        """Args: kwargs: those of :class:`TwoStageQueryHead`."""
        super().__init__(**kwargs)
        self.box_proj = nn.Linear(2 * self.embed_dim, 2 * self.embed_dim)
        self.box_norm = nn.LayerNorm(2 * self.embed_dim)
        nn.init.xavier_uniform_(self.box_proj.weight)
        nn.init.zeros_(self.box_proj.bias)

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        return two_stage_arguments(
            cfg,
            position_encoding=SinePositionEncoding(cfg.MODEL.CODETR.EMBED_DIM, temperature=10000.0, offset=-0.5),
            decoder={"reference_eps": 1e-5},
            criterion={"encoder_objectness": True},
            content_only=False,
        )

    def class_rows(self) -> dict[str, ClassRows]:
        # The first row learns whether there is any object, which no choice of classes changes.
        return {"proposals.class_embed": ClassRows(are_classes=False)}

    def proposal_scores(self, proposals: EncoderProposals) -> Tensor:
        """See the base class: the logits of class 0, which the encoder learns as objectness."""
        return proposals.logits[..., 0]

    def matching_queries(self, boxes: Tensor) -> QueryGroup:
        """See the base class; the position comes from the box."""
        group = super().matching_queries(boxes)
        embedding = sine_embedding(group.reference_boxes, self.embed_dim // 2)
        position = self.box_norm(self.box_proj(embedding))[..., : self.embed_dim]
        return dataclasses.replace(group, position=position)

    def encoder_output(self, proposals: EncoderProposals, index: Tensor) -> tuple[DecoderOutput, Tensor]:
        """See the base class: every token is trained."""
        boxes = self.proposals.box_logits(proposals).sigmoid()
        output = DecoderOutput(proposals.logits[None], boxes[None], proposals.embeddings[None])
        return output, gather_tokens(boxes, index)
