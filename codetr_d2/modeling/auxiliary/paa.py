"""The PAA auxiliary head."""

import itertools

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances, pairwise_iou
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from ...distributed import reduce_mean
from ...layers import focal_loss, paired_iou
from ...option_checks import positive, within
from ..assigners.max_iou import MaxIoUMatcher
from ..assigners.paa import select_by_mixture
from ..facts import ClassRows
from .anchors import square_anchors
from .base import AUX_HEAD_REGISTRY
from .dense import BACKGROUND, DenseHead, DenseTargets

__all__ = ["PAAHead"]


@AUX_HEAD_REGISTRY.register("paa")
class PAAHead(DenseHead):
    """Probabilistic anchor assignment with one square anchor at each cell, and a predicted IoU beside its box.

    Each object gets the anchors that overlap it; of these, those are positive that have a small loss already.

    Losses: ``loss_cls`` (focal), ``loss_box`` (GIoU, weighted by the IoU of the predicted box), ``loss_iou``.

    Source: paper, section 3.2 and table 1; PAA (Kim and Lee, ECCV 2020).
    """

    options = "PAA"
    loss_names = ("loss_cls", "loss_box", "loss_iou")
    OPTIONS_OF_NAMES = {"": "MODEL.PAA.NUM_CONVS"}

    @classmethod
    def check_options(cls, cfg: CfgNode) -> None:
        super().check_options(cfg)
        positive(cfg, "MODEL.PAA.TOPK", "MODEL.PAA.ANCHOR_SCALE")
        within(cfg, 0, 1, "MODEL.PAA.IOU_THRESHOLD")

    def class_rows(self) -> dict[str, ClassRows]:
        return {"cls_score": ClassRows()}

    @configurable
    def __init__(
        self,
        *,
        strides: list[int],
        anchor_scale: float = 8.0,
        bbox_reg_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0),
        iou_threshold: float = 0.1,
        topk: int = 9,
        score_voting: bool = True,
        **kwargs,
    ) -> None:
        """
        Args:
            strides: stride of each level in pixels, from fine to coarse.
            anchor_scale: side of an anchor, in strides.
            bbox_reg_weights: factors of the deltas (dx, dy, dw, dh), as in ``Box2BoxTransform``.
            iou_threshold: the least overlap with an object of the anchors that it gets, beside its best ones.
            topk: candidates of each object on one level.
            score_voting: detections are means of all the boxes that overlap them.
            kwargs: those of :class:`DenseHead`.
        """
        super().__init__(strides=strides, anchor_generator=square_anchors(strides, anchor_scale), **kwargs)
        self.box2box_transform = Box2BoxTransform(weights=tuple(bbox_reg_weights))
        # An object that overlaps no anchor at all has no best ones.
        self.matcher = MaxIoUMatcher([iou_threshold], [0, 1], min_pos_iou=torch.finfo(torch.float32).tiny)
        self.least_overlap = iou_threshold
        self.topk = topk
        self.score_voting = score_voting
        self.box_deltas = self.predictor(4)
        self.iou = self.predictor(1)
        self.scales = nn.ParameterList([nn.Parameter(torch.tensor(1.0)) for _ in strides])

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shapes: list[ShapeSpec]) -> dict:
        return {
            **super().from_config(cfg, input_shapes),
            "anchor_scale": cfg.MODEL.PAA.ANCHOR_SCALE,
            "bbox_reg_weights": cfg.MODEL.PAA.BBOX_REG_WEIGHTS,
            "iou_threshold": cfg.MODEL.PAA.IOU_THRESHOLD,
            "topk": cfg.MODEL.PAA.TOPK,
            "score_voting": cfg.MODEL.PAA.SCORE_VOTING,
        }

    def predict_boxes(self, x: Tensor, level: int) -> tuple[Tensor, Tensor]:
        """Box deltas and logits of the IoU; see the base class."""
        return self.box_deltas(x) * self.scales[level], self.iou(x)

    def assign(self, anchors: Tensor, anchors_per_level: list[int], gt_boxes: Tensor) -> Tensor:
        """See the base class."""
        matches, labels = self.matcher(pairwise_iou(Boxes(gt_boxes), Boxes(anchors)))
        return torch.where(labels == 1, matches, BACKGROUND)

    def refine(
        self, assigned: Tensor, anchors: list[Boxes], predictions: list[Tensor], targets: list[Instances]
    ) -> Tensor:
        """See the base class."""
        logits, deltas, _ = predictions
        image, anchor = (assigned >= 0).nonzero(as_tuple=True)
        before = itertools.accumulate((len(x) for x in targets[:-1]), initial=0)  # objects of the images before
        objects = assigned[image, anchor] + torch.tensor(list(before), device=assigned.device)[image]
        gt_boxes = torch.cat([x.gt_boxes.tensor for x in targets]).to(deltas)[objects]
        gt_classes = torch.cat([x.gt_classes for x in targets])[objects]
        boxes = self.decode(deltas[image, anchor], Boxes.cat(anchors).tensor[anchor])
        losses = focal_loss(logits[image, anchor], gt_classes) * self.loss_weights["loss_cls"]
        losses = losses + generalized_box_iou_loss(boxes, gt_boxes) * self.loss_weights["loss_box"]
        levels = torch.cat([torch.full_like(x.tensor[:, 0], i, dtype=torch.int64) for i, x in enumerate(anchors)])[
            anchor
        ]
        dropped = ~select_by_mixture(losses, objects, levels, self.topk)
        refined = assigned.clone()
        refined[image[dropped], anchor[dropped]] = BACKGROUND
        return refined

    def losses(self, predictions: list[Tensor], targets: DenseTargets) -> dict[str, Tensor]:
        """See the base class."""
        logits, deltas, iou = predictions
        positive = targets.is_positive
        num_positives = reduce_mean(positive.sum().float(), min_sum=1)
        loss_cls = (focal_loss(logits, targets.labels) * targets.is_trained).sum()

        anchors, gt_boxes = targets.positives()
        boxes = self.decode(deltas[positive], anchors)
        quality = paired_iou(boxes.detach(), gt_boxes)
        sum_of_qualities = reduce_mean(quality.sum(), min_sum=torch.finfo(quality.dtype).eps)
        loss_box = (generalized_box_iou_loss(boxes, gt_boxes) * quality).sum()

        loss_iou = F.binary_cross_entropy_with_logits(iou[positive], quality, reduction="sum")
        return {
            "loss_cls": loss_cls / num_positives.clamp(min=len(logits)),  # the number of images
            "loss_box": loss_box / sum_of_qualities,
            "loss_iou": loss_iou / num_positives,
        }

    def decode(self, predictions: Tensor, anchors: Tensor) -> Tensor:
        """See the base class."""
        return self.box2box_transform.apply_deltas(predictions, anchors)

    def select(self, logits: Tensor, boxes: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The best anchors by their best class, each with all classes whose score is high enough; see the base class.

        The score, the root of class probability times IoU, decides.
        """
        [iou] = others
        scores = (logits.sigmoid() * iou.sigmoid().unsqueeze(1)).sqrt()
        anchors = scores.amax(dim=1).topk(min(self.pre_nms_topk, len(scores))).indices
        row, classes = (scores[anchors] > self.score_thresh).nonzero(as_tuple=True)
        return anchors[row], classes, scores[anchors[row], classes]

    def suppress(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """See the base class."""
        kept_boxes, kept_scores, kept_classes = super().suppress(boxes, scores, classes)
        if self.score_voting:
            for c in kept_classes.unique():
                mine, voters = kept_classes == c, classes == c
                kept_boxes[mine] = _vote(kept_boxes[mine], boxes[voters], scores[voters])
        return kept_boxes, kept_scores, kept_classes


def _vote(kept: Tensor, boxes: Tensor, scores: Tensor) -> Tensor:
    """The mean, for each box of a class that is kept, of all boxes of the class that overlap it.

    It is weighted by the score and the closeness. Source: PAA, section 3.3.

    Args:
        kept: [N, 4] xyxy, some of ``boxes``.
        boxes: [M, 4] xyxy.
        scores: [M].

    Returns:
        [N, 4] xyxy.
    """
    iou = pairwise_iou(Boxes(kept), Boxes(boxes))  # [N, M]
    weights = scores * (-(1 - iou).square() / 0.025).exp() * (iou > 0.01)
    # No matrix product: autocast would round it.
    means = (weights.unsqueeze(2) * boxes).sum(dim=1) / weights.sum(dim=1, keepdim=True)
    return means.clamp(boxes.amin(dim=0), boxes.amax(dim=0))  # rounding takes none out of the image
