"""Whether the anchors of the auxiliary heads suit the objects that they are to be trained on."""

import logging
import statistics
from collections.abc import Iterable

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from ..data.mapper import annotation_boxes
from ..modeling.auxiliary import AuxiliaryHead

__all__ = ["warn_of_unsuitable_anchors"]

logger = logging.getLogger(__name__)


def warn_of_unsuitable_anchors(cfg: CfgNode, model: nn.Module, records: Iterable[dict]) -> None:
    """Warn, once for each option, of anchors that fit no object at all; a few images tell where they fit.

    An anchor fits an object if they overlap enough with the same centre, at the size that training gives the image:
    the middle one of ``INPUT.MIN_SIZE_TRAIN``, or the canvas of large-scale jitter.

    Args:
        cfg: the config.
        model: its auxiliary heads are looked at.
        records: the dataset dicts of the training set, in detectron2's format.
    """
    heads = [module.anchor_sizes() for module in model.modules() if isinstance(module, AuxiliaryHead)]
    unsuitable = {anchors.option: anchors for anchors in heads if anchors is not None}
    smallest, largest, count = float("inf"), 0.0, 0
    for record in records:
        if not unsuitable:
            return
        objects = [x for x in record.get("annotations", []) if not x.get("iscrowd", 0)]
        if not objects or "width" not in record:
            continue
        boxes = torch.from_numpy(annotation_boxes(objects)) * _scale(cfg, record["height"], record["width"])
        sizes = boxes[:, 2:] - boxes[:, :2]
        for option, anchors in list(unsuitable.items()):
            if (_overlaps(sizes, anchors.sizes.to(sizes)) >= anchors.least_overlap).any():
                del unsuitable[option]
        sides = sizes.prod(dim=1).sqrt()
        smallest, largest, count = (
            min(smallest, sides.min().item()),
            max(largest, sides.max().item()),
            count + len(sides),
        )
    if not count:
        return
    for option, anchors in unsuitable.items():
        sides = anchors.sizes.prod(dim=1).sqrt()
        logger.warning(
            "%s: no anchor suits any of the %d objects. Scaled as in training, these have sides of %.0f to %.0f "
            "pixels, the anchors %.0f to %.0f. Change the option so that these meet",
            *(option, count, smallest, largest, sides.min(), sides.max()),
        )


def _scale(cfg: CfgNode, height: int, width: int) -> float:
    """What the sides of an image are multiplied by in training, about."""
    if cfg.INPUT.LARGE_SCALE_JITTER.ENABLED:
        return cfg.MODEL.CODETR.CANVAS_SIZE / max(height, width)
    size = statistics.median(cfg.INPUT.MIN_SIZE_TRAIN)
    return min(size / min(height, width), cfg.INPUT.MAX_SIZE_TRAIN / max(height, width)) if size else 1.0


def _overlaps(sizes: Tensor, others: Tensor) -> Tensor:
    """[N, 2] and [M, 2] (width, height) -> [N, M] IoU of boxes with the same centre."""
    shared = torch.minimum(sizes[:, None], others).prod(dim=2)
    return shared / (sizes.prod(dim=1)[:, None] + others.prod(dim=1) - shared)
