"""The query head of Co-DINO."""

import math

from detectron2.config import CfgNode, configurable
from torch import Tensor

from ...layers import SinePositionEncoding
from ...option_checks import within
from ..queries import ContrastiveDenoising, gather_tokens
from ..structures import DecoderOutput, EncoderProposals, QueryGroup, Targets
from .base import QUERY_HEAD_REGISTRY
from .two_stage import TwoStageQueryHead, two_stage_arguments

__all__ = ["CoDINOHead"]

REFERENCE_EPS = 1e-3  # of the inverse sigmoid on reference boxes


@QUERY_HEAD_REGISTRY.register()
class CoDINOHead(TwoStageQueryHead):
    """DINO: tokens are chosen by their best class, queries find their position in their box at every layer, and noised
    ground truth is a further group of queries in training. Classification is trained with the quality focal loss.

    Source: DINO (Zhang et al., ICLR 2023), as Co-DETR was published with it.
    """

    PUBLISHED_NAMES = [
        *TwoStageQueryHead.PUBLISHED_NAMES,
        ("query_head.transformer.query_embed.weight", "query_content.weight"),
        ("query_head.transformer.decoder.ref_point_head.{n}.{rest}", "decoder.position_head.{n}.{rest}"),
        ("query_head.transformer.decoder.norm.{rest}", "decoder.norm.{rest}"),
        ("query_head.label_embedding.weight", "denoising.label_embed.weight"),
    ]
    OPTIONAL_PARTS = {
        **TwoStageQueryHead.OPTIONAL_PARTS,
        "denoising": "for denoising; MODEL.CODETR.DENOISING.NUM_QUERIES is 0",
    }
    TELLING_PARAMETER = "decoder.norm.weight"

    @classmethod
    def check_options(cls, cfg: CfgNode) -> None:
        super().check_options(cfg)
        within(cfg, 0, math.inf, *(f"MODEL.CODETR.DENOISING.{x}" for x in ("NUM_QUERIES", "BOX_NOISE")))
        within(cfg, 0, 1, "MODEL.CODETR.DENOISING.LABEL_NOISE")

    @configurable
    def __init__(self, *, denoising: ContrastiveDenoising | None = None, **kwargs):
        """
        Args:
            denoising: makes the denoising queries, or None.
            kwargs: those of :class:`TwoStageQueryHead`.
        """
        super().__init__(**kwargs)
        self.denoising = denoising

    @classmethod
    def from_config(cls, cfg: CfgNode) -> dict:
        options = cfg.MODEL.CODETR
        denoising = None
        if options.DENOISING.NUM_QUERIES > 0:
            denoising = ContrastiveDenoising(
                options.EMBED_DIM,
                options.NUM_CLASSES,
                options.DENOISING.NUM_QUERIES,
                options.DENOISING.LABEL_NOISE,
                options.DENOISING.BOX_NOISE,
            )
        arguments = two_stage_arguments(
            cfg,
            position_encoding=SinePositionEncoding(options.EMBED_DIM, temperature=20.0, offset=0.0),
            decoder={"position_from_boxes": True, "final_norm": True, "reference_eps": REFERENCE_EPS},
            criterion={"quality_focal": True, "encoder_objectness": False},
            content_only=True,
        )
        return {**arguments, "denoising": denoising}

    def proposal_scores(self, proposals: EncoderProposals) -> Tensor:
        """See the base class: the largest logit of any class."""
        return proposals.logits.amax(-1)

    def encoder_output(self, proposals: EncoderProposals, index: Tensor) -> tuple[DecoderOutput, Tensor]:
        """See the base class: the tokens that become queries are trained."""
        boxes = self.proposals.box_logits(proposals, index).sigmoid()
        logits, embeddings = gather_tokens(proposals.logits, index), gather_tokens(proposals.embeddings, index)
        return DecoderOutput(logits[None], boxes[None], embeddings[None]), boxes

    def extra_queries(self, targets: Targets) -> list[QueryGroup]:
        """See the base class."""
        return [] if self.denoising is None else [self.denoising(targets)]
