"""Anchors of the auxiliary heads, on detectron2's anchor generator."""

import math

import torch
from detectron2.modeling import ANCHOR_GENERATOR_REGISTRY
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes
from torch import Tensor

__all__ = ["RatioMajorAnchorGenerator", "centerness_of", "decode_deltas", "square_anchors", "valid_anchors"]


@ANCHOR_GENERATOR_REGISTRY.register()
class RatioMajorAnchorGenerator(DefaultAnchorGenerator):
    """detectron2's anchors in another order: inside a cell, the aspect ratios come outer and the sizes inner.

    That is the order of the channels in the published weights of Co-DETR's region proposal network.
    """

    def generate_cell_anchors(
        self, sizes: tuple = (32, 64, 128, 256, 512), aspect_ratios: tuple = (0.5, 1, 2)
    ) -> Tensor:
        """[len(aspect_ratios) * len(sizes), 4] anchors around (0, 0), xyxy in pixels; see the base class."""
        anchors = super().generate_cell_anchors(sizes, aspect_ratios)
        return anchors.view(len(sizes), len(aspect_ratios), 4).transpose(0, 1).reshape(-1, 4)


def square_anchors(strides: list[int], scale: float, offset: float = 0.0) -> DefaultAnchorGenerator:
    """A generator of one square anchor for each cell, of the side ``scale`` strides.

    Args:
        strides: the stride of each level, in pixels.
        scale: side of an anchor, in strides.
        offset: centre of an anchor from its cell's top left corner, in strides.
    """
    sizes = [[scale * stride] for stride in strides]
    return DefaultAnchorGenerator(sizes=sizes, aspect_ratios=[1.0], strides=strides, offset=offset)


def valid_anchors(
    anchors: list[Boxes], strides: list[int], image_size: tuple[int, int], offset: float = 0.0
) -> list[Tensor]:
    """Which anchors belong to cells that an image reaches, and so not to its padding.

    Args:
        anchors: the anchors of each level, as detectron2's anchor generators give them.
        strides: the stride of each level, in pixels.
        image_size: (height, width) of the image, in pixels.
        offset: centre of a cell's anchors from its top left corner, in strides.

    Returns:
        For each level a bool tensor, one entry for each anchor: True where the index of its cell is below
        ``ceil(image size / stride)`` in both directions.
    """
    height, width = image_size
    masks = []
    for boxes, stride in zip(anchors, strides):
        # The centre of a box is subject to rounding, the index of its cell is not.
        cells = (boxes.get_centers() / stride - offset).round()
        limits = cells.new_tensor([math.ceil(width / stride), math.ceil(height / stride)])
        masks.append((cells < limits).all(dim=1))
    return masks


def decode_deltas(transform: Box2BoxTransform, deltas: Tensor, anchors: Tensor) -> Tensor:
    """The boxes that deltas make of anchors, whose sides shrink by no larger a factor than they may grow by.

    detectron2's transform limits the growth alone.

    Args:
        transform: gives the weights of the deltas and the limit of the factor.
        deltas: [M, 4] (dx, dy, dw, dh).
        anchors: [M, 4] xyxy.

    Returns:
        [M, 4] xyxy.
    """
    dx, dy, dw, dh = deltas.unbind(dim=1)
    _, _, width_weight, height_weight = transform.weights
    dw = dw.clamp(min=-transform.scale_clamp * width_weight)
    dh = dh.clamp(min=-transform.scale_clamp * height_weight)
    return transform.apply_deltas(torch.stack([dx, dy, dw, dh], dim=1), anchors)


def centerness_of(anchors: Tensor, gt_boxes: Tensor) -> Tensor:
    """How central [P, 4] boxes ``gt_boxes`` have the centres of [P, 4] ``anchors``: [P], from 0 (border) to 1."""
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    left_top, right_bottom = centers - gt_boxes[:, :2], gt_boxes[:, 2:] - centers
    ratios = torch.minimum(left_top, right_bottom) / torch.maximum(left_top, right_bottom)  # horizontal, vertical
    return ratios.prod(dim=1).sqrt()
