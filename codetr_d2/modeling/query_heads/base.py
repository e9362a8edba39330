"""What every query head has in common (queries, decoder, losses, detections), and their registry."""

import dataclasses
import math

from detectron2.config import CfgNode
from detectron2.structures import Instances
from detectron2.utils.registry import Registry
from torch import nn

from ...option_checks import divisible, one_of, option, positive, within
from ..assigners.hungarian import HungarianMatcher
from ..auxiliary import auxiliary_head_names
from ..criterion import SetCriterion
from ..postprocess import detections_from_queries
from ..pyramid import FeaturePyramid
from ..queries import PositiveQueries
from ..structures import DecoderOutput, PositiveSamples, QueryGroup, Targets

__all__ = ["QUERY_HEAD_REGISTRY", "QueryHead", "query_head_arguments"]

QUERY_HEAD_REGISTRY = Registry("QUERY_HEAD")
QUERY_HEAD_REGISTRY.__doc__ = """
Registry of query heads, the detectors' own: the names that ``MODEL.CODETR.QUERY_HEAD`` may have.

The registered object is called with ``obj(cfg)`` and returns a :class:`QueryHead`. A query head is trained with the
auxiliary heads and is all that inference keeps of them.
"""


class QueryHead(nn.Module):
    """A DETR behind the neck: it encodes the features, and decodes queries to detections.

    A subclass says how features are encoded (:meth:`encode`), how the matching queries look
    (:meth:`queries_and_proposals`), and which further groups of queries training adds (:meth:`extra_queries`). The
    positive queries of the auxiliary heads, the losses and the detections are made here.

    Args:
        encoder: of the transformer.
        decoder: (groups of queries, encoder's output) -> for each group a :class:`DecoderOutput`.
        proposals: predicts, from the encoder's output, what queries start from; None where they start from what is
            learned alone.
        positive_queries: one module for each auxiliary head, by its name; none for no such queries.
        criterion: the losses.
        embed_dim: channels of the encoder's output and of the queries.
        max_detections: detections of each image at inference.
        soft_nms_thresh: IoU from which on detections of a class lower each other's score; 0 for no soft-NMS.
        positive_weight: weight of the losses of the positive queries (lambda_1 in eq. 6).
    """

    OPTIONAL_PARTS = {
        "positive_queries.*": "queries of an auxiliary head that MODEL.CODETR.AUX_HEADS does not list, or "
        "MODEL.CODETR.POSITIVE_QUERIES.ENABLED is False"
    }

    def __init__(
        self,
        *,
        encoder: nn.Module,
        decoder: nn.Module,
        proposals: nn.Module | None = None,
        positive_queries: dict[str, PositiveQueries],
        criterion: SetCriterion,
        embed_dim: int,
        max_detections: int,
        soft_nms_thresh: float = 0.0,
        positive_weight: float = 1.0,
    ):
        super().__init__()
        # In this order, which that of the optimizer's state follows.
        self.encoder = encoder
        self.decoder = decoder
        self.proposals = proposals
        self.positive_queries = nn.ModuleDict(positive_queries)
        self.criterion = criterion
        self.embed_dim = embed_dim
        self.max_detections = max_detections
        self.soft_nms_thresh = soft_nms_thresh
        self.positive_weight = positive_weight

    @classmethod
    def check_options(cls, cfg: CfgNode) -> None:
        """Check what every query head here is built from; a subclass adds its own."""
        dim = cfg.MODEL.CODETR.EMBED_DIM
        positive(cfg, "MODEL.CODETR.NUM_QUERIES", "MODEL.CODETR.EMBED_DIM")
        for part in ("MODEL.CODETR.ENCODER", "MODEL.CODETR.DECODER"):
            positive(cfg, *(f"{part}.{x}" for x in ("NUM_LAYERS", "NUM_HEADS", "FFN_DIM")))
            divisible("MODEL.CODETR.EMBED_DIM", dim, option(cfg, f"{part}.NUM_HEADS"), f"{part}.NUM_HEADS")
            within(cfg, 0, 1, f"{part}.DROPOUT")
        divisible("MODEL.CODETR.EMBED_DIM", dim, 4, "the sine and cosine of two coordinates")
        one_of(cfg, "MODEL.CODETR.POSITIVE_QUERIES.PADDING", ["negatives", "mask"])
        positive(cfg, *(f"MODEL.CODETR.POSITIVE_QUERIES.{x}" for x in ("MAX_PER_HEAD", "MIN_PER_HEAD")))
        within(cfg, 0, math.inf, "MODEL.CODETR.LAMBDA1")
        within(cfg, 0, 1, "MODEL.CODETR.SOFT_NMS_THRESH")

    def encode(self, pyramid: FeaturePyramid) -> FeaturePyramid:
        """The neck's output -> the encoder's output, which the auxiliary heads read too."""
        raise NotImplementedError

    def queries_and_proposals(self, memory: FeaturePyramid) -> tuple[QueryGroup, DecoderOutput | None]:
        """The matching queries, and the predictions of the encoder that are trained, as one more layer; None for none.

        What the queries carry has no gradient but for what is learned of themselves.
        """
        raise NotImplementedError

    def matching_queries_at_inference(self, memory: FeaturePyramid) -> QueryGroup:
        """The matching queries where nothing is trained; override it where that is less work."""
        return self.queries_and_proposals(memory)[0]

    def extra_queries(self, targets: Targets) -> list[QueryGroup]:
        """Groups of queries that training adds behind the matching ones."""
        return []

    def losses(
        self, memory: FeaturePyramid, samples: dict[str, PositiveSamples], instances: list[Instances]
    ) -> tuple[dict, DecoderOutput]:
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
        if samples.keys() != self.positive_queries.keys():
            raise ValueError(f"candidates of {list(samples)}, but positive queries for {list(self.positive_queries)}")
        targets = Targets(instances, memory.geometry.image_sizes_xyxy)
        matching, encoder_output = self.queries_and_proposals(memory)
        groups = [matching, *self.extra_queries(targets)]
        for head, module in self.positive_queries.items():
            group = module(samples[head], targets.image_sizes_xyxy, name=f"_aux_{head}")
            groups.append(dataclasses.replace(group, loss_weight=self.positive_weight))
        outputs = self.decoder(groups, memory)
        return self.criterion(outputs, encoder_output, targets), outputs[0]

    def predict(self, memory: FeaturePyramid) -> DecoderOutput:
        """Predictions of every decoder layer for the matching queries alone."""
        return self.decoder([self.matching_queries_at_inference(memory)], memory)[0]

    def finish(self, output: DecoderOutput, memory: FeaturePyramid) -> list[Instances]:
        """Raw predictions -> the detections of each image, in pixels of the network input."""
        logits, boxes, sizes = output.logits[-1], output.boxes[-1], memory.geometry.image_sizes
        return detections_from_queries(logits, boxes, sizes, self.max_detections, self.soft_nms_thresh)

    def inference(self, memory: FeaturePyramid) -> list[Instances]:
        """The detections of each image, in pixels of the network input."""
        return self.finish(self.predict(memory), memory)


def query_head_arguments(cfg: CfgNode, *, criterion: dict, content_only: bool) -> dict:
    """What the config says of any query head, as arguments of :class:`QueryHead`, but for encoder and decoder.

    Args:
        cfg: the config.
        criterion: further arguments of :class:`SetCriterion`, in which the query heads differ.
        content_only: see :class:`PositiveQueries`.
    """
    options = cfg.MODEL.CODETR
    dim, num_classes, positives = options.EMBED_DIM, options.NUM_CLASSES, options.POSITIVE_QUERIES
    return {
        "positive_queries": {
            name: PositiveQueries(
                dim, num_classes, positives.MAX_PER_HEAD, positives.MIN_PER_HEAD, positives.PADDING, content_only
            )
            for name in auxiliary_head_names(options.AUX_HEADS if positives.ENABLED else [])
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
        "max_detections": cfg.TEST.DETECTIONS_PER_IMAGE,
        "soft_nms_thresh": options.SOFT_NMS_THRESH,
        "positive_weight": options.LAMBDA1,
    }
