"""The FCOS auxiliary head."""

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransformLinear
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from ...distributed import reduce_mean
from ...layers import focal_loss
from ...option_checks import positive
from ..assigners.fcos import assign_fcos
from ..facts import ClassRows
from ..pyramid import Geometry
from .anchors import centerness_of, square_anchors
from .base import AUX_HEAD_REGISTRY
from .dense import DenseHead, DenseTargets

__all__ = ["FCOSHead"]

# Side of the box around a point that is handed on to the decoder, in strides.
BOX_SIDE = 8


@AUX_HEAD_REGISTRY.register("fcos")
class FCOSHead(DenseHead):
    """FCOS, which starts from the centre of each cell of the pyramid: its points.

    What it hands on are square boxes around the points. Points in the padding are trained as background.

    Losses: ``loss_cls`` (focal), ``loss_box`` (GIoU, weighted by centre-ness), ``loss_centerness``.

    Source: paper, section 3.2 and table 1; FCOS (Tian et al., ICCV 2019) with its authors' later improvements: centre
    sampling, distances in strides, centre-ness from the box tower.
    """

    options = "FCOS"
    loss_names = ("loss_cls", "loss_box", "loss_centerness")
    OPTIONS_OF_NAMES = {"": "MODEL.FCOS.NUM_CONVS"}

    @classmethod
    def check_options(cls, cfg: CfgNode) -> None:
        super().check_options(cfg)
        positive(cfg, "MODEL.FCOS.CENTER_SAMPLING_RADIUS")

    def class_rows(self) -> dict[str, ClassRows]:
        return {"cls_score": ClassRows()}

    @configurable
    def __init__(self, *, strides: list[int], center_sampling_radius: float = 1.5, **kwargs) -> None:
        """
        Args:
            strides: stride of each level in pixels, from fine to coarse.
            center_sampling_radius: see ``radius`` of :func:`assign_fcos`.
            kwargs: those of :class:`DenseHead`.
        """
        anchor_generator = square_anchors(strides, BOX_SIDE, offset=0.5)
        super().__init__(strides=strides, anchor_generator=anchor_generator, conv_bias=True, **kwargs)
        self.center_sampling_radius = center_sampling_radius
        self.box2box_transform = Box2BoxTransformLinear(normalize_by_size=True)
        self.box_distances = self.predictor(4)
        self.centerness = self.predictor(1)
        self.scales = nn.ParameterList([nn.Parameter(torch.tensor(1.0)) for _ in strides])

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shapes: list[ShapeSpec]) -> dict:
        return {
            **super().from_config(cfg, input_shapes),
            "center_sampling_radius": cfg.MODEL.FCOS.CENTER_SAMPLING_RADIUS,
        }

    def anchor_sizes(self) -> None:
        """See the base class; there are only points."""

    def predict_boxes(self, x: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Distances to the left, upper, right and lower side in strides, and centre-ness logits; see the base class."""
        return self.box_distances(x) * self.scales[level], self.centerness(x)

    def training_sizes(self, geometry: Geometry) -> list[tuple[int, int]]:
        """See the base class; the padding too."""
        return [geometry.batch_shape] * len(geometry.image_sizes)

    def assign(self, anchors: Tensor, anchors_per_level: list[int], gt_boxes: Tensor, *_) -> Tensor:
        """See the base class."""
        points = (anchors[:, :2] + anchors[:, 2:]) / 2
        return assign_fcos(points, anchors_per_level, self.strides, gt_boxes, self.center_sampling_radius)

    def losses(self, predictions: list[Tensor], targets: DenseTargets) -> dict[str, Tensor]:
        """See the base class."""
        logits, distances, centerness = predictions
        positive = targets.is_positive
        num_positives = reduce_mean(positive.sum().float(), min_sum=1)
        loss_cls = (focal_loss(logits, targets.labels) * targets.is_trained).sum()

        anchors, gt_boxes = targets.positives()
        centerness_targets = centerness_of(anchors, gt_boxes)
        loss_box = generalized_box_iou_loss(self.decode(distances[positive], anchors), gt_boxes) * centerness_targets
        loss_box = loss_box.sum() / reduce_mean(centerness_targets.sum(), min_sum=1e-6)

        loss_centerness = F.binary_cross_entropy_with_logits(centerness[positive], centerness_targets, reduction="sum")
        return {
            "loss_cls": loss_cls / num_positives,
            "loss_box": loss_box,
            "loss_centerness": loss_centerness / num_positives,
        }

    def decode(self, predictions: Tensor, anchors: Tensor) -> Tensor:
        """See the base class; a negative distance counts as 0."""
        return self.box2box_transform.apply_deltas(predictions / BOX_SIDE, anchors)

    def score(self, probabilities: Tensor, centerness: Tensor) -> Tensor:
        """See the base class."""
        return probabilities * centerness.sigmoid()
