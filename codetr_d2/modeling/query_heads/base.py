"""The common part of the query heads (encoder, proposals, groups of queries, decoder) and their registry."""

import dataclasses

import torch
from detectron2.config import CfgNode
from detectron2.structures import Instances
from detectron2.utils.registry import Registry
from torch import Tensor, nn

from ...layers import SinePositionEncoding
from ..assigners.hungarian import HungarianMatcher
from ..auxiliary import auxiliary_head_names
from ..criterion import SetCriterion
from ..postprocess import detections_from_queries
from ..queries import PositiveQueries, TwoStageProposals
from ..structures import (
    DecoderOutput,
    EncoderProposals,
    FeaturePyramid,
    PositiveSamples,
    QueryGroup,
    Targets,
    once_for_each_geometry,
)
from ..transformer import DeformableDecoder, DeformableEncoder

__all__ = ["QUERY_HEAD_REGISTRY", "QueryHead", "query_head_arguments"]

QUERY_HEAD_REGISTRY = Registry("QUERY_HEAD")
QUERY_HEAD_REGISTRY.__doc__ = """
Registry of query heads, the detectors' own: the names that ``MODEL.CODETR.QUERY_HEAD`` may have.

The registered object is called with ``obj(cfg)``. A query head is trained with the auxiliary heads and is all that
inference keeps of them.
"""


class QueryHead(nn.Module):
    """Two-stage deformable DETR with mixed query selection, and with positive queries in training.

    A subclass says which tokens become queries (:meth:`best_proposals`), how these look (:meth:`matching_queries`),
    what of the encoder is trained (:meth:`encoder_output`), and which further groups of queries training adds
    (:meth:`extra_queries`).

    Args:
        encoder, decoder: the transformer.
        position_encoding: of the feature maps' cells.
        proposals: predicts class and box at every token of the encoder.
        positive_queries: one module for each auxiliary head, by its name.
        criterion: the losses.
        embed_dim: channels.
        num_queries: number of matching queries.
        max_detections: detections of each image at inference.
        soft_nms_thresh: IoU from which on detections of a class lower each other's score; 0 for no soft-NMS.
        positive_weight: weight of the losses of the positive queries (lambda_1 in eq. 6).
    """

    def __init__(
        self,
        *,
        encoder: DeformableEncoder,
        decoder: DeformableDecoder,
        position_encoding: SinePositionEncoding,
        proposals: TwoStageProposals,
        positive_queries: dict[str, PositiveQueries],
        criterion: SetCriterion,
        embed_dim: int,
        num_queries: int,
        max_detections: int,
        soft_nms_thresh: float = 0.0,
        positive_weight: float = 1.0,
    ):
        super().__init__()
        self.encoder = encoder
        self.decoder = decoder
        self.position_encoding = position_encoding
        self.proposals = proposals
        self.positive_queries = nn.ModuleDict(positive_queries)
        self.criterion = criterion
        self.embed_dim = embed_dim
        self.num_queries = num_queries
        self.max_detections = max_detections
        self.soft_nms_thresh = soft_nms_thresh
        self.positive_weight = positive_weight
        self.query_content = nn.Embedding(num_queries, embed_dim)

    @property
    def num_decoder_layers(self) -> int:
        return len(self.decoder.layers)

    def encode(self, pyramid: FeaturePyramid) -> FeaturePyramid:
        """The neck's output -> the encoder's output, of the same shape."""
        return dataclasses.replace(pyramid, tokens=self.encoder(pyramid, self.positions(pyramid)))

    @once_for_each_geometry
    def positions(self, pyramid: FeaturePyramid) -> Tensor:
        """[B, S, C] position encoding of the tokens."""
        masks = pyramid.padding_mask.split([h * w for h, w in pyramid.shapes], dim=1)
        position = [self.position_encoding(m.unflatten(1, shape)) for m, shape in zip(masks, pyramid.shapes)]
        return torch.cat(position, dim=1)

    def losses(
        self, memory: FeaturePyramid, samples: dict[str, PositiveSamples], instances: list[Instances]
    ) -> tuple[dict[str, Tensor], DecoderOutput]:
        """
        Args:
            memory: the encoder's output.
            samples: the candidates of each auxiliary head, by its name.
            instances: the ground truth of each image, boxes in pixels of the network input.

        Returns:
            The losses of :class:`SetCriterion`, those of the positive queries with ``_aux_<head>`` in their names, and
            the predictions for the matching queries.

        Raises:
            ValueError: ``samples`` are not those of the heads that the positive queries were built for.
        """
        proposals = self.proposals(memory)
        index = self.best_proposals(proposals)
        encoder_output, boxes = self.encoder_output(proposals, index)
        targets = Targets(instances, memory.image_sizes_xyxy)
        groups = [self.matching_queries(boxes.detach()), *self.extra_queries(targets)]
        if samples.keys() != self.positive_queries.keys():
            raise ValueError(f"candidates of {list(samples)}, but positive queries for {list(self.positive_queries)}")
        for head, module in self.positive_queries.items():
            group = module(samples[head], memory.image_sizes_xyxy, name=f"_aux_{head}")
            groups.append(dataclasses.replace(group, loss_weight=self.positive_weight))
        outputs = self.decoder(groups, memory)
        return self.criterion(outputs, encoder_output, targets), outputs[0]

    def inference(self, memory: FeaturePyramid) -> list[Instances]:
        """The detections of each image, in pixels of the network input."""
        output = self.predict(memory)
        return detections_from_queries(
            output.logits[-1], output.boxes[-1], memory.image_sizes, self.max_detections, self.soft_nms_thresh
        )

    def predict(self, memory: FeaturePyramid) -> DecoderOutput:
        """Predictions of every decoder layer for the matching queries alone."""
        proposals = self.proposals(memory)
        boxes = self.proposals.box_logits(proposals, self.best_proposals(proposals)).sigmoid()
        return self.decoder([self.matching_queries(boxes)], memory)[0]

    def best_proposals(self, proposals: EncoderProposals) -> Tensor:
        """[B, Q] indices of the tokens with the highest scores, by falling score."""
        scores = self.proposal_scores(proposals)
        return scores.topk(min(self.num_queries, scores.shape[1]), dim=1).indices

    def proposal_scores(self, proposals: EncoderProposals) -> Tensor:
        """[B, S] logits by which tokens are chosen."""
        raise NotImplementedError

    def matching_queries(self, boxes: Tensor) -> QueryGroup:
        """Mixed query selection: the boxes [B, Q, 4] of the best proposals, learned content, and no position."""
        content = self.query_content.weight[: boxes.shape[1]].expand(len(boxes), -1, -1)
        return QueryGroup(name="", content=content, reference_boxes=boxes)

    def encoder_output(self, proposals: EncoderProposals, index: Tensor) -> tuple[DecoderOutput, Tensor]:
        """The proposals that are trained, as one more layer of predictions, and the boxes of the tokens ``index``."""
        raise NotImplementedError

    def extra_queries(self, targets: Targets) -> list[QueryGroup]:
        """Groups of queries that training adds behind the matching ones."""
        return []


def query_head_arguments(
    cfg: CfgNode, *, position_encoding: SinePositionEncoding, decoder: dict, criterion: dict, content_only: bool
) -> dict:
    """What the config says of any query head, as arguments of :class:`QueryHead`.

    Args:
        cfg: the config.
        position_encoding: of the feature maps' cells.
        decoder, criterion: further arguments of these, in which the query heads differ.
        content_only: see :class:`PositiveQueries`.
    """
    options = cfg.MODEL.CODETR
    dim, num_classes = options.EMBED_DIM, options.NUM_CLASSES

    def transformer_args(part: CfgNode) -> dict:
        return {
            "embed_dim": dim,
            "num_layers": part.NUM_LAYERS,
            "num_heads": part.NUM_HEADS,
            "num_levels": options.NUM_FEATURE_LEVELS,
            "num_points": part.NUM_POINTS,
            "ffn_dim": part.FFN_DIM,
            "dropout": part.DROPOUT,
            "activation_checkpointing": options.ACTIVATION_CHECKPOINTING,
        }

    positives = options.POSITIVE_QUERIES
    return {
        "encoder": DeformableEncoder(**transformer_args(options.ENCODER)),
        "decoder": DeformableDecoder(num_classes=num_classes, **transformer_args(options.DECODER), **decoder),
        "position_encoding": position_encoding,
        "proposals": TwoStageProposals(dim, num_classes),
        "positive_queries": {
            name: PositiveQueries(
                dim, num_classes, positives.MAX_PER_HEAD, positives.MIN_PER_HEAD, positives.PADDING, content_only
            )
            for name in auxiliary_head_names(options.AUX_HEADS)
        },
        "criterion": SetCriterion(
            num_classes,
            HungarianMatcher(options.COST_CLS, options.COST_BOX, options.COST_GIOU),
            weight_cls=options.LOSS_CLS,
            weight_box=options.LOSS_BOX,
            weight_giou=options.LOSS_GIOU,
            **criterion,
        ),
        "embed_dim": dim,
        "num_queries": options.NUM_QUERIES,
        "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        "soft_nms_thresh": options.SOFT_NMS_THRESH,
        "positive_weight": options.LAMBDA1,
    }
