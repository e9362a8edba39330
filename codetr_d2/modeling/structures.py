"""The types that flow between the rooms of the model, beside the :class:`~codetr_d2.modeling.pyramid.FeaturePyramid`.

Shapes use B images, S tokens (all cells of all levels), C channels, Q queries, K classes.
"""

from dataclasses import dataclass, field

import torch
from detectron2.structures import Instances
from torch import Tensor
from torchvision.ops import box_convert

__all__ = [
    "DecoderOutput",
    "EncoderProposals",
    "PositiveSamples",
    "QueryGroup",
    "Targets",
]


class Targets:
    """The ground truth of a batch, padded to one size.

    Args:
        instances: for each image its ``gt_boxes`` (xyxy pixels) and ``gt_classes``.
        image_sizes_xyxy: [B, 4] (w, h, w, h) of the images in pixels.

    Attributes:
        num_targets: number of objects of each image.
        labels: [B, G] int64, padded with 0.
        boxes: [B, G, 4] cxcywh normalised, padded with 0.
        image_sizes_xyxy: as given.
    """

    def __init__(self, instances: list[Instances], image_sizes_xyxy: Tensor):
        self.num_targets = [len(x) for x in instances]
        self.image_sizes_xyxy = image_sizes_xyxy
        size = max(self.num_targets)
        labels = image_sizes_xyxy.new_zeros((len(instances), size), dtype=torch.int64)
        boxes = image_sizes_xyxy.new_zeros((len(instances), size, 4))
        for i, x in enumerate(instances):
            labels[i, : len(x)] = x.gt_classes
            boxes[i, : len(x)] = box_convert(x.gt_boxes.tensor / image_sizes_xyxy[i], "xyxy", "cxcywh")
        self.labels, self.boxes = labels, boxes


@dataclass
class EncoderProposals:
    """A class prediction at every token of the encoder, and what a box is predicted from.

    Attributes:
        logits: [B, S, K] class logits.
        prior_logits: [B, S, 4] the token's prior box before the sigmoid, cxcywh; +inf where no proposal can be.
        embeddings: [B, S, C] the features that classes and boxes come from.
    """

    logits: Tensor
    prior_logits: Tensor
    embeddings: Tensor


@dataclass
class PositiveSamples:
    """What an auxiliary head hands on to the decoder: its candidates with their one-to-many targets.

    Lists have one entry for each image; M is the number of candidates of that image. Candidates whose label is
    ``num_classes`` are background. Nothing here but ``features`` carries a gradient. Source: paper, section 3.2.

    Attributes:
        boxes: [M, 4] coordinates of the candidates (proposals, anchors), xyxy in pixels of the network input.
        labels: [M] int64 assigned class, ``num_classes`` for background.
        target_boxes: [M, 4] box of the assigned ground truth, xyxy pixels; of no meaning where background.
        features: [M / n, C], the feature of every n candidates in a row: of those of one cell, where a head has several
            anchors there; otherwise n is 1.
    """

    boxes: list[Tensor]
    labels: list[Tensor]
    target_boxes: list[Tensor]
    features: list[Tensor]


@dataclass
class QueryGroup:
    """Decoder queries of one origin. Groups go through the decoder together; each attends to itself.

    Attributes:
        name: suffix of its losses: "" for the matching queries, "_dn", "_aux_roi", "_aux_atss", ...
        content: [B, Q, C] content embeddings.
        reference_boxes: [B, Q, 4] initial boxes, cxcywh normalised by the image size. They carry no gradient, unless
            they are learned of themselves.
        position: [B, Q, C] position embeddings, or None where the decoder computes them from the reference boxes.
        padding_mask: [B, Q] bool, True at slots that hold no query (they are attended by no query and have no loss).
        attention_mask: [Q, Q] bool, True where the query of the row may attend to that of the column; None: anywhere.
        sees_previous: its queries also attend to those of the group before it, which do not attend to them.
        labels: [B, Q] int64 fixed class targets (``num_classes`` for background), or None: matched one to one.
        target_boxes: [B, Q, 4] fixed box targets, cxcywh normalised, or None.
        loss_weight: factor of its losses, beside those of the kinds of loss.
    """

    name: str
    content: Tensor
    reference_boxes: Tensor
    position: Tensor | None = None
    padding_mask: Tensor | None = None
    attention_mask: Tensor | None = None
    sees_previous: bool = False
    labels: Tensor | None = None
    target_boxes: Tensor | None = None
    loss_weight: float = 1.0

    @property
    def num_queries(self) -> int:
        return self.content.shape[1]


@dataclass
class DecoderOutput:
    """Predictions of every decoder layer for one group of queries.

    Attributes:
        logits: [layers, B, Q, K] class logits.
        boxes: [layers, B, Q, 4] boxes, cxcywh normalised by the image size.
        states: [layers, B, Q, C] decoder states that the logits and boxes come from.
        references: [layers + 1, B, Q, 4] the boxes that steer the attention of each layer, and that a next one would
            start from; cxcywh normalised. None for the encoder's predictions.
        group: the queries, with their targets where these are fixed. None for the encoder's predictions.
    """

    logits: Tensor
    boxes: Tensor
    states: Tensor
    references: Tensor | None = None
    group: QueryGroup | None = field(default=None, repr=False)
