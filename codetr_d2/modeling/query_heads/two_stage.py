"""What two-stage deformable query heads have in common: the encoder, proposals at its tokens, mixed selection."""

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ...layers import SinePositionEncoding
from ...option_checks import positive
from ..facts import ClassRows, under
from ..pyramid import FeaturePyramid
from ..queries import PositiveQueries, TwoStageProposals
from ..structures import DecoderOutput, EncoderProposals, QueryGroup
from ..transformer import DeformableDecoder, DeformableEncoder
from .base import QueryHead, query_head_arguments

__all__ = ["TwoStageQueryHead", "two_stage_arguments"]


class TwoStageQueryHead(QueryHead):
    """Two-stage deformable DETR with mixed query selection.

    A subclass says which tokens become queries (:meth:`proposal_scores`), how these look (:meth:`matching_queries`) and
    what of the encoder is trained (:meth:`encoder_output`).

    Args:
        position_encoding: of the feature maps' cells.
        num_queries: number of matching queries.
        kwargs: those of :class:`QueryHead`; ``proposals`` predict class and box at every token of the encoder.
    """

    PUBLISHED_NAMES = [
        *under("encoder", DeformableEncoder.PUBLISHED_NAMES),
        *under("proposals", TwoStageProposals.PUBLISHED_NAMES),  # before the decoder's, which fit any branch
        *under("decoder", DeformableDecoder.PUBLISHED_NAMES),
        *under("positive_queries.{head}", PositiveQueries.PUBLISHED_NAMES),
    ]
    OPTIONS_OF_SHAPES = {
        "query_content": "MODEL.CODETR.NUM_QUERIES",
        "encoder.level_embed": "MODEL.CODETR.NUM_FEATURE_LEVELS",
        **{
            f"{part}.layers.*.{layer}": options
            for part in ("encoder", "decoder")
            for layer, options in (
                ("ffn", "MODEL.CODETR.ENCODER.FFN_DIM and DECODER.FFN_DIM"),
                ("*.sampling_offsets", "MODEL.CODETR.NUM_FEATURE_LEVELS and the NUM_HEADS and NUM_POINTS"),
                ("*.attention_weights", "MODEL.CODETR.NUM_FEATURE_LEVELS and the NUM_HEADS and NUM_POINTS"),
            )
        },
    }
    OPTIONS_OF_NAMES = {
        "encoder.layers": "MODEL.CODETR.ENCODER.NUM_LAYERS",
        **{f"decoder.{x}": "MODEL.CODETR.DECODER.NUM_LAYERS" for x in ("layers", "class_embed", "box_embed")},
    }

    @classmethod
    def check_options(cls, cfg: CfgNode) -> None:
        super().check_options(cfg)
        positive(cfg, "MODEL.CODETR.ENCODER.NUM_POINTS", "MODEL.CODETR.DECODER.NUM_POINTS")

    def class_rows(self) -> dict[str, ClassRows]:
        return {"proposals.class_embed": ClassRows()}

    def __init__(
        self,
        *,
        position_encoding: SinePositionEncoding,
        num_queries: int,
        **kwargs,
    ):
        super().__init__(**kwargs)
        self.position_encoding = position_encoding
        self.num_queries = num_queries
        self.query_content = nn.Embedding(num_queries, self.embed_dim)

    def encode(self, pyramid: FeaturePyramid) -> FeaturePyramid:
        """See the base class; the output has the shape of the input."""
        geometry = pyramid.geometry
        with torch.no_grad():
            levels = [self.position_encoding(mask, geometry.is_padded) for mask in geometry.level_padding]
        return pyramid.with_tokens(self.encoder(pyramid, torch.cat(levels, dim=1)))

    def queries_and_proposals(self, memory: FeaturePyramid) -> tuple[QueryGroup, DecoderOutput | None]:
        """See the base class."""
        proposals = self.proposals(memory)
        encoder_output, boxes = self.encoder_output(proposals, self.best_proposals(proposals))
        return self.matching_queries(boxes.detach()), encoder_output

    def matching_queries_at_inference(self, memory: FeaturePyramid) -> QueryGroup:
        """See the base class: boxes are predicted for the tokens that become queries alone."""
        proposals = self.proposals(memory)
        return self.matching_queries(self.proposals.box_logits(proposals, self.best_proposals(proposals)).sigmoid())

    def best_proposals(self, proposals: EncoderProposals) -> Tensor:
        """[B, Q] indices of the tokens with the highest scores, by falling score."""
        scores = self.proposal_scores(proposals)
        return scores.topk(min(self.num_queries, scores.shape[1]), dim=1).indices

    def proposal_scores(self, proposals: EncoderProposals) -> Tensor:
        """[B, S] logits by which tokens are chosen."""
        raise NotImplementedError

    def matching_queries(self, boxes: Tensor) -> QueryGroup:
        """Mixed query selection: the boxes [B, Q, 4] of the best proposals, learned content, and no position."""
        content = self.query_content.weight[: boxes.shape[1]].expand(boxes.shape[0], -1, -1)
        return QueryGroup(name="", content=content, reference_boxes=boxes)

    def encoder_output(self, proposals: EncoderProposals, index: Tensor) -> tuple[DecoderOutput, Tensor]:
        """The proposals that are trained, as one more layer of predictions, and the boxes of the tokens ``index``."""
        raise NotImplementedError


def two_stage_arguments(
    cfg: CfgNode, *, position_encoding: SinePositionEncoding, decoder: dict, criterion: dict, content_only: bool
) -> dict:
    """What the config says of any two-stage query head, as arguments of :class:`TwoStageQueryHead`.

    Args:
        cfg: the config.
        position_encoding: of the feature maps' cells.
        decoder, criterion: further arguments of these, in which the query heads differ.
        content_only: see :class:`PositiveQueries`.
    """
    options = cfg.MODEL.CODETR

    def transformer_args(part: CfgNode) -> dict:
        return {
            "embed_dim": options.EMBED_DIM,
            "num_layers": part.NUM_LAYERS,
            "num_heads": part.NUM_HEADS,
            "num_levels": options.NUM_FEATURE_LEVELS,
            "num_points": part.NUM_POINTS,
            "ffn_dim": part.FFN_DIM,
            "dropout": part.DROPOUT,
            "activation_checkpointing": options.ACTIVATION_CHECKPOINTING,
            "backend": cfg.MODEL.MS_DEFORM_ATTN,
        }

    return {
        "encoder": DeformableEncoder(**transformer_args(options.ENCODER)),
        "decoder": DeformableDecoder(num_classes=options.NUM_CLASSES, **transformer_args(options.DECODER), **decoder),
        "position_encoding": position_encoding,
        "proposals": TwoStageProposals(options.EMBED_DIM, options.NUM_CLASSES),
        "num_queries": options.NUM_QUERIES,
        **query_head_arguments(cfg, criterion=criterion, content_only=content_only),
    }
