"""The GFL auxiliary head."""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from ...distributed import reduce_mean
from ...layers import paired_iou, quality_focal_loss
from ...option_checks import positive
from ..assigners.atss import assign_atss
from ..facts import ClassRows
from .anchors import square_anchors
from .base import AUX_HEAD_REGISTRY
from .dense import DenseHead, DenseTargets

__all__ = ["GFLHead"]


@AUX_HEAD_REGISTRY.register("gfl")
class GFLHead(DenseHead):
    """Generalised focal loss: the class probability is the quality of the box, whose sides are distributions.

    It assigns square anchors as ATSS does. A side lies 0 to ``reg_max`` strides from the centre of its anchor: the mean
    of a distribution over these whole numbers, which is predicted.

    Losses: ``loss_cls`` (quality focal), ``loss_box`` (GIoU), ``loss_dfl`` (distribution focal); the latter two are
    weighted by the class probability of each positive.

    Source: paper, section 3.2 and table 1; Generalized Focal Loss (Li et al., NeurIPS 2020).
    """

    options = "GFL"
    loss_names = ("loss_cls", "loss_box", "loss_dfl")
    OPTIONS_OF_SHAPES = {"box_sides": "MODEL.GFL.REG_MAX"}
    OPTIONS_OF_NAMES = {"": "MODEL.GFL.NUM_CONVS"}

    @classmethod
    def check_options(cls, cfg: CfgNode) -> None:
        super().check_options(cfg)
        positive(cfg, "MODEL.GFL.TOPK", "MODEL.GFL.ANCHOR_SCALE", "MODEL.GFL.REG_MAX")

    def class_rows(self) -> dict[str, ClassRows]:
        return {"cls_score": ClassRows()}

    @configurable
    def __init__(
        self, *, strides: list[int], anchor_scale: float = 8.0, topk: int = 9, reg_max: int = 16, **kwargs
    ) -> None:
        """
        Args:
            strides: stride of each level in pixels, from fine to coarse.
            anchor_scale: side of an anchor, in strides.
            topk: candidates of each ground truth on one level.
            reg_max: the largest distance of a side from the centre of its anchor, in strides.
            kwargs: those of :class:`DenseHead`.
        """
        super().__init__(strides=strides, anchor_generator=square_anchors(strides, anchor_scale), **kwargs)
        self.anchor_scale = anchor_scale
        self.topk = topk
        self.reg_max = reg_max
        self.box_sides = self.predictor(4 * (reg_max + 1))
        self.scales = nn.ParameterList([nn.Parameter(torch.tensor(1.0)) for _ in strides])

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shapes: list[ShapeSpec]) -> dict:
        return {
            **super().from_config(cfg, input_shapes),
            "anchor_scale": cfg.MODEL.GFL.ANCHOR_SCALE,
            "topk": cfg.MODEL.GFL.TOPK,
            "reg_max": cfg.MODEL.GFL.REG_MAX,
        }

    def predict_boxes(self, x: Tensor, level: int) -> tuple[Tensor]:
        """Logits of the distributions of left, top, right and bottom, one after the other; see the base class."""
        return (self.box_sides(x) * self.scales[level],)

    def assign(self, anchors: Tensor, anchors_per_level: list[int], gt_boxes: Tensor) -> Tensor:
        """See the base class."""
        return assign_atss(anchors, anchors_per_level, gt_boxes, self.topk)

    def losses(self, predictions: list[Tensor], targets: DenseTargets) -> dict[str, Tensor]:
        """See the base class."""
        logits, sides = predictions
        positive = targets.is_positive
        anchors, gt_boxes = targets.positives()
        boxes = self.decode(sides[positive], anchors)

        quality = torch.zeros_like(targets.labels, dtype=torch.float32)
        quality[positive] = paired_iou(boxes.detach(), gt_boxes)
        num_positives = reduce_mean(positive.sum(dim=1).clamp(min=1).sum().float())
        loss_cls = quality_focal_loss(logits, targets.labels, quality) * targets.is_trained

        weights = logits[positive].detach().sigmoid().amax(dim=1)
        sum_of_weights = reduce_mean(weights.sum(), min_sum=1)
        loss_box = generalized_box_iou_loss(boxes, gt_boxes) * weights
        loss_dfl = self._distribution_loss(sides[positive], anchors, gt_boxes) * weights
        return {
            "loss_cls": loss_cls.sum() / num_positives,
            "loss_box": loss_box.sum() / sum_of_weights,
            "loss_dfl": loss_dfl.sum() / sum_of_weights,
        }

    def decode(self, predictions: Tensor, anchors: Tensor) -> Tensor:
        """See the base class."""
        numbers = torch.arange(self.reg_max + 1, device=predictions.device)
        # No matrix product: autocast would round it.
        distances = (predictions.unflatten(1, (4, -1)).softmax(dim=-1) * numbers).sum(dim=-1)  # [M, 4]
        centers, strides = self._centers_and_strides(anchors)
        left_top, right_bottom = (distances * strides).chunk(2, dim=1)
        return torch.cat((centers - left_top, centers + right_bottom), dim=1)

    def _distribution_loss(self, predictions: Tensor, anchors: Tensor, gt_boxes: Tensor) -> Tensor:
        """[P] cross-entropy of the four distributions with the distances of the ground truth, their mean.

        A distance between two whole numbers is split between them, linearly.
        """
        centers, strides = self._centers_and_strides(anchors)
        distances = torch.cat((centers - gt_boxes[:, :2], gt_boxes[:, 2:] - centers), dim=1) / strides
        distances = distances.clamp(0, self.reg_max - 0.1).flatten()
        below = distances.long()
        logits = predictions.unflatten(1, (4, -1)).flatten(0, 1)  # [P * 4, reg_max + 1]
        loss = F.cross_entropy(logits, below, reduction="none") * (below + 1 - distances)
        loss = loss + F.cross_entropy(logits, below + 1, reduction="none") * (distances - below)
        return loss.view(-1, 4).mean(dim=1)

    def _centers_and_strides(self, anchors: Tensor) -> tuple[Tensor, Tensor]:
        """[M, 2] centres of anchors and [M, 1] the strides of their levels, in pixels."""
        return (anchors[:, :2] + anchors[:, 2:]) / 2, (anchors[:, 2:3] - anchors[:, 0:1]) / self.anchor_scale
