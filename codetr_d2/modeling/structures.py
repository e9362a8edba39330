"""The types that flow between the rooms of the model.

Shapes use B images, L feature levels, S tokens (all cells of all levels), C channels, Q queries, K classes.
"""

import functools
from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import torch
from detectron2.structures import Instances
from torch import Tensor, nn
from torchvision.ops import box_convert

__all__ = [
    "DecoderOutput",
    "EncoderProposals",
    "FeaturePyramid",
    "PositiveSamples",
    "QueryGroup",
    "Targets",
    "once_for_each_geometry",
]


@dataclass
class FeaturePyramid:
    """Feature maps of several strides, flattened to one sequence of tokens.

    Tokens go level by level from the finest to the coarsest one, row by row inside a level.

    Attributes:
        tokens: [B, S, C] features.
        padding_mask: [B, S] bool, True where a token lies in the padding of its image.
        shapes: (height, width) of each level.
        strides: pixels of the network input that a cell of each level spans.
        image_sizes: (height, width) of each image inside the padded batch, in pixels: what "valid" means.
        batch_shape: (height, width) of the padded batch, in pixels.
        padded_sizes: image_sizes with each image padded as if it were alone in its batch: where anchors may lie.
        valid_ratios: [B, L, 2] share of each level that is not padding, as (x, y).
    """

    tokens: Tensor
    padding_mask: Tensor
    shapes: list[tuple[int, int]]
    strides: list[int]
    image_sizes: list[tuple[int, int]]
    batch_shape: tuple[int, int]
    padded_sizes: list[tuple[int, int]]
    valid_ratios: Tensor

    @property
    def spatial_shapes(self) -> Tensor:
        """[L, 2] int64 tensor of ``shapes``, on the CPU or the device of the tokens alike."""
        return torch.as_tensor(self.shapes, dtype=torch.int64, device=self.tokens.device)

    @property
    def level_start_index(self) -> Tensor:
        """[L] int64, the index of each level's first token."""
        sizes = self.spatial_shapes.prod(1)
        return sizes.cumsum(0) - sizes

    @property
    def value_mask(self) -> Tensor | None:
        """``padding_mask`` for attention, None where no image is padded: there is nothing to leave out then."""
        return None if all(size == self.batch_shape for size in self.image_sizes) else self.padding_mask

    @property
    def geometry(self) -> tuple:
        """What everything that does not depend on the features is made from; it can be compared."""
        return tuple(self.shapes), tuple(self.image_sizes), self.batch_shape, self.tokens.device

    @property
    def image_sizes_xyxy(self) -> Tensor:
        """[B, 4] float32, (width, height, width, height) of each image in pixels: the scale of normalised boxes."""
        sizes = [(w, h, w, h) for h, w in self.image_sizes]
        return torch.as_tensor(sizes, dtype=torch.float32, device=self.tokens.device)

    @property
    def cell_centres(self) -> Tensor:
        """[B, S, 2] float32, the centre of each token's cell as (x, y), normalised by the valid part of its level."""
        device = self.tokens.device
        centres = []
        for level, (height, width) in enumerate(self.shapes):
            y = torch.arange(height, dtype=torch.float32, device=device) + 0.5
            x = torch.arange(width, dtype=torch.float32, device=device) + 0.5
            cells = torch.stack((x.repeat(height), y.repeat_interleave(width)), dim=-1)  # [h * w, 2]
            centres.append(cells / (self.valid_ratios[:, None, level] * torch.tensor([width, height], device=device)))
        return torch.cat(centres, dim=1)

    def maps(self) -> list[Tensor]:
        """The levels as maps, each [B, C, height, width], in channels-last layout."""
        levels = self.tokens.split([h * w for h, w in self.shapes], dim=1)
        # In this order the strides are those of channels last for a single image too, and convolutions take it as such.
        return [x.unflatten(1, shape).permute(0, 3, 1, 2) for x, shape in zip(levels, self.shapes)]


def once_for_each_geometry(method: Callable[[nn.Module, FeaturePyramid], Any]) -> Callable:
    """Decorate a module's method whose result depends on the geometry of a pyramid alone: the last one is kept."""
    name = f"_last_{method.__name__}"

    @functools.wraps(method)
    def wrapper(module: nn.Module, pyramid: FeaturePyramid) -> Any:
        if torch.compiler.is_compiling():  # a graph holds no state
            return method(module, pyramid)
        geometry, result = module.__dict__.get(name, (None, None))
        if geometry != pyramid.geometry:
            with torch.no_grad():
                result = method(module, pyramid)
            module.__dict__[name] = pyramid.geometry, result
        return result

    return wrapper


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
        features: [M, C] feature of each candidate.
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
        reference_boxes: [B, Q, 4] initial boxes, cxcywh normalised by the image size. They carry no gradient.
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
