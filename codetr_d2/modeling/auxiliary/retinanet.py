"""The RetinaNet auxiliary head."""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor
from torchvision.ops import generalized_box_iou_loss

from ...distributed import reduce_mean
from ...errors import InputError
from ...layers import focal_loss
from ...option_checks import positive
from ..assigners.max_iou import MaxIoUMatcher
from ..facts import ClassRows
from ..pyramid import FeaturePyramid
from .anchors import RatioMajorAnchorGenerator, decode_deltas
from .base import AUX_HEAD_REGISTRY
from .conv_at_cells import conv_at_cells
from .dense import BACKGROUND, IGNORED, DenseHead, DenseTargets

__all__ = ["RetinaNetHead"]

# The anchors of a cell: height / width, and sides in units of the smallest one.
ASPECT_RATIOS = [0.5, 1.0, 2.0]
OCTAVE_SCALES = [2 ** (k / 3) for k in range(3)]


@AUX_HEAD_REGISTRY.register("retinanet")
class RetinaNetHead(DenseHead):
    """RetinaNet with nine anchors at each cell of the pyramid, and the box loss of the other heads.

    Losses: ``loss_cls`` (focal), ``loss_box`` (GIoU).

    Source: paper, section 3.2 and table 1; RetinaNet (Lin et al., ICCV 2017).
    """

    options = "RETINANET"
    topk_option = "TOPK_CANDIDATES_TEST"
    loss_names = ("loss_cls", "loss_box")
    OPTIONS_OF_NAMES = {"": "MODEL.RETINANET.NUM_CONVS"}

    @classmethod
    def check_options(cls, cfg: CfgNode) -> None:
        super().check_options(cfg)
        positive(cfg, "MODEL.RETINANET.ANCHOR_SCALE")
        thresholds, labels = cfg.MODEL.RETINANET.IOU_THRESHOLDS, cfg.MODEL.RETINANET.IOU_LABELS
        if not thresholds or any(not 0 < x <= 1 for x in thresholds) or sorted(thresholds) != list(thresholds):
            raise InputError(
                f"MODEL.RETINANET.IOU_THRESHOLDS is {thresholds}; it must list rising overlaps, greater than 0 and at "
                "most 1"
            )
        if len(labels) != len(thresholds) + 1 or any(x not in (-1, 0, 1) for x in labels):
            raise InputError(
                f"MODEL.RETINANET.IOU_LABELS is {labels}; it must have one entry more than IOU_THRESHOLDS "
                f"({thresholds}), each 0 (background), -1 (ignored) or 1 (positive)"
            )

    def class_rows(self) -> dict[str, ClassRows]:
        return {"cls_score": ClassRows(repeats=self.anchors_per_cell)}

    @configurable
    def __init__(
        self,
        *,
        strides: list[int],
        anchor_scale: float = 4.0,
        iou_thresholds: list[float] = (0.4, 0.5),
        iou_labels: list[int] = (0, -1, 1),
        bbox_reg_weights: tuple[float, float, float, float] = (1.0, 1.0, 1.0, 1.0),
        **kwargs,
    ) -> None:
        """
        Args:
            strides: stride of each level in pixels, from fine to coarse.
            anchor_scale: side of the smallest square anchor, in strides.
            iou_thresholds, iou_labels: as ``thresholds`` and ``labels`` of :class:`MaxIoUMatcher`.
            bbox_reg_weights: factors of the deltas (dx, dy, dw, dh), as in ``Box2BoxTransform``.
            kwargs: those of :class:`DenseHead`.
        """
        anchor_generator = RatioMajorAnchorGenerator(
            sizes=[[anchor_scale * stride * octave for octave in OCTAVE_SCALES] for stride in strides],
            aspect_ratios=[ASPECT_RATIOS],
            strides=strides,
            offset=0.0,
        )
        super().__init__(strides=strides, anchor_generator=anchor_generator, norm=False, conv_bias=True, **kwargs)
        self.matcher = MaxIoUMatcher(iou_thresholds, iou_labels, min_pos_iou=0.0)
        self.least_overlap = iou_thresholds[-1]
        self.box2box_transform = Box2BoxTransform(weights=tuple(bbox_reg_weights))
        self.box_deltas = self.predictor(4)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shapes: list[ShapeSpec]) -> dict:
        options = cfg.MODEL.RETINANET
        return {
            **super().from_config(cfg, input_shapes),
            "anchor_scale": options.ANCHOR_SCALE,
            "iou_thresholds": options.IOU_THRESHOLDS,
            "iou_labels": options.IOU_LABELS,
            "bbox_reg_weights": options.BBOX_REG_WEIGHTS,
        }

    def predict_boxes(self, x: Tensor, level: int) -> tuple[Tensor]:
        """Box deltas; see the base class."""
        return (self.box_deltas(x),)

    def predict_and_assign(
        self, pyramid: FeaturePyramid, targets: list[Instances]
    ) -> tuple[list[Tensor], DenseTargets]:
        """See the base class. Nothing but the positives, [P, 4], needs box predictions, as the assignment needs none
        and no normalisation looks at the whole map."""
        maps = pyramid.maps()
        logits = torch.cat([self.predict_classes(x) for x in maps], dim=1)
        dense_targets = self.targets(pyramid.geometry, self.anchor_generator(maps), [logits], targets)
        positive = dense_targets.is_positive.unflatten(1, (-1, self.anchors_per_cell))  # [B, cells, anchors of a cell]
        cells = positive.any(dim=2)
        deltas = conv_at_cells(maps, cells, [*self.box_tower, self.box_deltas])  # [cells with a positive, anchors * 4]
        return [logits, deltas.float().unflatten(1, (-1, 4))[positive[cells]]], dense_targets

    def assign(self, anchors: Tensor, anchors_per_level: list[int], gt_boxes: Tensor, *_) -> Tensor:
        """See the base class."""
        index, labels = self.matcher(pairwise_iou(Boxes(gt_boxes), Boxes(anchors)))
        return torch.where(labels == 1, index, torch.where(labels == 0, BACKGROUND, IGNORED))

    def losses(self, predictions: list[Tensor], targets: DenseTargets) -> dict[str, Tensor]:
        """See the base class; the boxes are those of the positives, [P, 4]."""
        logits, deltas = predictions
        num_positives = reduce_mean(targets.is_positive.sum(dim=1).clamp(min=1).sum().float())
        loss_cls = (focal_loss(logits, targets.labels) * targets.is_trained).sum()
        anchors, gt_boxes = targets.positives()
        loss_box = generalized_box_iou_loss(self.decode(deltas, anchors), gt_boxes, reduction="sum")
        return {"loss_cls": loss_cls / num_positives, "loss_box": loss_box / num_positives}

    def decode(self, predictions: Tensor, anchors: Tensor) -> Tensor:
        """See the base class."""
        return decode_deltas(self.box2box_transform, predictions, anchors)
