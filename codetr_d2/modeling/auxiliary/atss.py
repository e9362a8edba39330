"""The ATSS auxiliary head."""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from ...distributed import reduce_mean
from ...layers import focal_loss
from ...option_checks import positive
from ..assigners.atss import assign_atss
from ..facts import ClassRows
from .anchors import centerness_of, square_anchors
from .base import AUX_HEAD_REGISTRY
from .dense import DenseHead, DenseTargets

__all__ = ["ATSSHead"]


@AUX_HEAD_REGISTRY.register("atss")
class ATSSHead(DenseHead):
    """ATSS with one square anchor at each cell of the pyramid.

    Losses: ``loss_cls`` (focal), ``loss_box`` (GIoU, weighted by centre-ness), ``loss_centerness``.

    Source: paper, section 3.2 and table 1; ATSS (Zhang et al., CVPR 2020).
    """

    options = "ATSS"
    loss_names = ("loss_cls", "loss_box", "loss_centerness")
    PUBLISHED_NAMES = [
        ("bbox_head.0.cls_convs.{n}.gn.{rest}", "cls_tower.{n}.norm.{rest}"),
        ("bbox_head.0.cls_convs.{n}.conv.{rest}", "cls_tower.{n}.{rest}"),
        ("bbox_head.0.reg_convs.{n}.gn.{rest}", "box_tower.{n}.norm.{rest}"),
        ("bbox_head.0.reg_convs.{n}.conv.{rest}", "box_tower.{n}.{rest}"),
        ("bbox_head.0.atss_cls.{rest}", "cls_score.{rest}"),
        ("bbox_head.0.atss_reg.{rest}", "box_deltas.{rest}"),
        ("bbox_head.0.atss_centerness.{rest}", "centerness.{rest}"),
        ("bbox_head.0.scales.{n}.scale", "scales.{n}"),
    ]
    OPTIONS_OF_NAMES = {"": "MODEL.ATSS.NUM_CONVS"}

    @classmethod
    def check_options(cls, cfg: CfgNode) -> None:
        super().check_options(cfg)
        positive(cfg, "MODEL.ATSS.TOPK", "MODEL.ATSS.ANCHOR_SCALE")

    def class_rows(self) -> dict[str, ClassRows]:
        return {"cls_score": ClassRows()}

    @configurable
    def __init__(
        self,
        *,
        strides: list[int],
        anchor_scale: float = 8.0,
        topk: int = 9,
        bbox_reg_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0),
        **kwargs,
    ) -> None:
        """
        Args:
            strides: stride of each level in pixels, from fine to coarse.
            anchor_scale: side of an anchor, in strides.
            topk: candidates of each ground truth on one level.
            bbox_reg_weights: factors of the deltas (dx, dy, dw, dh), as in ``Box2BoxTransform``.
            kwargs: those of :class:`DenseHead`.
        """
        super().__init__(strides=strides, anchor_generator=square_anchors(strides, anchor_scale), **kwargs)
        self.topk = topk
        self.box2box_transform = Box2BoxTransform(weights=tuple(bbox_reg_weights))
        self.box_deltas = self.predictor(4)
        self.centerness = self.predictor(1)
        self.scales = nn.ParameterList([nn.Parameter(torch.tensor(1.0)) for _ in strides])

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shapes: list[ShapeSpec]) -> dict:
        return {
            **super().from_config(cfg, input_shapes),
            "anchor_scale": cfg.MODEL.ATSS.ANCHOR_SCALE,
            "topk": cfg.MODEL.ATSS.TOPK,
            "bbox_reg_weights": cfg.MODEL.ATSS.BBOX_REG_WEIGHTS,
        }

    def predict_boxes(self, x: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Box deltas and centre-ness logits; see the base class."""
        return self.box_deltas(x) * self.scales[level], self.centerness(x)

    def assign(self, anchors: Tensor, anchors_per_level: list[int], gt_boxes: Tensor) -> Tensor:
        """See the base class."""
        return assign_atss(anchors, anchors_per_level, gt_boxes, self.topk)

    def losses(self, predictions: list[Tensor], targets: DenseTargets) -> dict[str, Tensor]:
        """See the base class."""
        logits, deltas, centerness = predictions
        positive = targets.is_positive
        num_positives = reduce_mean(positive.sum(dim=1).clamp(min=1).sum().float())
        loss_cls = (focal_loss(logits, targets.labels) * targets.is_trained).sum() / num_positives

        anchors, gt_boxes = targets.positives()
        centerness_targets = centerness_of(anchors, gt_boxes)
        loss_box = generalized_box_iou_loss(self.decode(deltas[positive], anchors), gt_boxes) * centerness_targets
        loss_box = loss_box.sum() / reduce_mean(centerness_targets.sum(), min_sum=1)

        loss_centerness = F.binary_cross_entropy_with_logits(centerness[positive], centerness_targets, reduction="sum")
        return {"loss_cls": loss_cls, "loss_box": loss_box, "loss_centerness": loss_centerness / num_positives}

    def decode(self, predictions: Tensor, anchors: Tensor) -> Tensor:
        """See the base class."""
        return self.box2box_transform.apply_deltas(predictions, anchors)

    def score(self, probabilities: Tensor, centerness: Tensor) -> Tensor:
        """See the base class."""
        return probabilities * centerness.sigmoid()
