"""The ATSS auxiliary head."""

import math

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import Conv2d, ShapeSpec, batched_nms
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.modeling.box_regression import Box2BoxTransform
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn import functional as F
from torchvision.ops import generalized_box_iou_loss

from ...distributed import reduce_mean
from ...layers import focal_loss, soft_nms
from ..assigners.atss import assign_atss
from ..pyramid import FeaturePyramid
from ..structures import PositiveSamples
from .anchors import valid_anchors
from .base import AUX_HEAD_REGISTRY, AuxiliaryHead

__all__ = ["ATSSHead"]


class ATSSHead(AuxiliaryHead):
    """ATSS with one square anchor at each cell of the pyramid.

    Its candidates for the decoder are the anchors of all cells, in the order of the tokens, with the tokens as their
    features. Anchors of cells in the padding of an image are background, and their boxes all zero.

    Losses: ``loss_cls`` (focal), ``loss_box`` (GIoU, weighted by centre-ness), ``loss_centerness``.

    Source: paper, section 3.2 and table 1; ATSS (Zhang et al., CVPR 2020).
    """

    @configurable
    def __init__(
        self,
        *,
        in_channels: int,
        strides: list[int],
        num_classes: int,
        num_convs: int = 1,
        anchor_scale: float = 8.0,
        topk: int = 9,
        bbox_reg_weights: tuple[float, float, float, float] = (10.0, 10.0, 5.0, 5.0),
        loss_weights: dict[str, float],
        pre_nms_topk: int = 1000,
        nms_thresh: float = 0.6,
        soft_nms: bool = False,
        detections_per_image: int = 100,
    ) -> None:
        """
        Args:
            in_channels: channels of the pyramid.
            strides: stride of each level in pixels, from fine to coarse.
            num_classes: the number of object classes; background is not counted.
            num_convs: stacked convolutions before the predictors.
            anchor_scale: side of an anchor, in strides.
            topk: candidates of each ground truth on one level.
            bbox_reg_weights: factors of the deltas (dx, dy, dw, dh), as in ``Box2BoxTransform``.
            loss_weights: factor of each loss, by its name.
            pre_nms_topk: (cell, class) pairs of each level that go into non-maximum suppression.
            nms_thresh: IoU above which the lower score of a class is suppressed.
            soft_nms: lower that score instead (:func:`codetr_d2.layers.soft_nms`).
            detections_per_image: the largest number of detections of an image.
        """
        super().__init__()
        self.strides = strides
        self.num_classes = num_classes
        self.topk = topk
        self.loss_weights = loss_weights
        self.pre_nms_topk = pre_nms_topk
        self.nms_thresh = nms_thresh
        self.soft_nms = soft_nms
        self.detections_per_image = detections_per_image
        self.box2box_transform = Box2BoxTransform(weights=tuple(bbox_reg_weights))
        self.anchor_generator = DefaultAnchorGenerator(
            sizes=[[anchor_scale * stride] for stride in strides], aspect_ratios=[1.0], strides=strides, offset=0.0
        )

        def tower() -> nn.Sequential:
            return nn.Sequential(
                *(
                    Conv2d(
                        in_channels,
                        in_channels,
                        kernel_size=3,
                        padding=1,
                        bias=False,
                        norm=nn.GroupNorm(math.gcd(32, in_channels // 2), in_channels),
                        activation=F.relu,
                    )
                    for _ in range(num_convs)
                )
            )

        self.cls_tower = tower()
        self.box_tower = tower()
        self.cls_score = nn.Conv2d(in_channels, num_classes, kernel_size=3, padding=1)
        self.box_deltas = nn.Conv2d(in_channels, 4, kernel_size=3, padding=1)
        self.centerness = nn.Conv2d(in_channels, 1, kernel_size=3, padding=1)
        self.scales = nn.ParameterList([nn.Parameter(torch.tensor(1.0)) for _ in strides])

        for module in self.modules():
            if isinstance(module, nn.Conv2d):
                nn.init.normal_(module.weight, std=0.01)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        nn.init.constant_(self.cls_score.bias, -math.log(99))  # a probability of 0.01

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shapes: list[ShapeSpec]) -> dict:
        return {
            "in_channels": input_shapes[0].channels,
            "strides": [shape.stride for shape in input_shapes],
            "num_classes": cfg.MODEL.CODETR.NUM_CLASSES,
            "num_convs": cfg.MODEL.ATSS.NUM_CONVS,
            "anchor_scale": cfg.MODEL.ATSS.ANCHOR_SCALE,
            "topk": cfg.MODEL.ATSS.TOPK,
            "bbox_reg_weights": cfg.MODEL.ATSS.BBOX_REG_WEIGHTS,
            "loss_weights": {
                "loss_cls": cfg.MODEL.ATSS.LOSS_CLS,
                "loss_box": cfg.MODEL.ATSS.LOSS_BOX,
                "loss_centerness": cfg.MODEL.ATSS.LOSS_CENTERNESS,
            },
            "pre_nms_topk": cfg.MODEL.ATSS.PRE_NMS_TOPK_TEST,
            "nms_thresh": cfg.MODEL.ATSS.NMS_THRESH_TEST,
            "soft_nms": cfg.MODEL.ATSS.SOFT_NMS,
            "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def forward(self, pyramid: FeaturePyramid, targets: list[Instances]) -> tuple[dict[str, Tensor], PositiveSamples]:
        """See the base class."""
        maps = pyramid.maps()
        levels = self.anchor_generator(maps)
        anchors = Boxes.cat(levels).tensor  # [S, 4]
        valid, labels, target_boxes = [], [], []
        for size, x in zip(pyramid.geometry.padded_sizes, targets):
            valid.append(torch.cat(valid_anchors(levels, self.strides, size)))
            # How many these are on each level, without a look at the device.
            counts = [
                math.prod(min(math.ceil(side / stride), cells) for side, cells in zip(size, shape))
                for stride, shape in zip(self.strides, pyramid.geometry.shapes)
            ]
            image_labels, image_boxes = self._assign(anchors, valid[-1], counts, x)
            labels.append(image_labels)
            target_boxes.append(image_boxes)
        predictions = [torch.cat(levels, dim=1) for levels in zip(*self.predict(maps))]
        losses = self.losses(*predictions, anchors, torch.stack(valid), torch.stack(labels), torch.stack(target_boxes))
        return losses, PositiveSamples(
            boxes=[anchors * x[:, None] for x in valid],
            labels=labels,
            target_boxes=target_boxes,
            features=list(pyramid.tokens),
        )

    def predict(self, maps: list[Tensor]) -> list[tuple[Tensor, Tensor, Tensor]]:
        """The raw predictions on feature maps [B, C, height, width].

        Returns:
            For each level: class logits [B, height * width, K], box deltas [B, height * width, 4] and centre-ness
            logits [B, height * width], all float32.
        """
        predictions = []
        for x, scale in zip(maps, self.scales):
            x_cls, x_box = self.cls_tower(x), self.box_tower(x)
            outputs = self.cls_score(x_cls), self.box_deltas(x_box) * scale, self.centerness(x_box)
            # [B, C, H, W] -> [B, H * W, C]
            logits, deltas, centerness = (output.flatten(2).transpose(1, 2).float() for output in outputs)
            predictions.append((logits, deltas, centerness.squeeze(2)))
        return predictions

    @torch.no_grad()
    def _assign(self, anchors: Tensor, valid: Tensor, valid_per_level: list[int], targets: Instances):
        """Labels [S] int64 and assigned boxes [S, 4] (zero for background) of an image's anchors."""
        gt_boxes = targets.gt_boxes.tensor.to(anchors)
        assigned = torch.full(valid.shape, -1, dtype=torch.int64, device=anchors.device)
        assigned[valid] = assign_atss(anchors[valid], valid_per_level, gt_boxes, self.topk)
        positive = assigned >= 0
        labels = torch.full_like(assigned, self.num_classes)
        labels[positive] = targets.gt_classes[assigned[positive]]
        boxes = torch.zeros_like(anchors)
        boxes[positive] = gt_boxes[assigned[positive]]
        return labels, boxes

    def losses(
        self,
        logits: Tensor,
        deltas: Tensor,
        centerness: Tensor,
        anchors: Tensor,
        valid: Tensor,
        labels: Tensor,
        target_boxes: Tensor,
    ) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            logits, deltas, centerness: [B, S, K], [B, S, 4] and [B, S], from :meth:`predict`.
            anchors: [S, 4], xyxy pixels.
            valid: [B, S] bool, False for the anchors that take no part.
            labels: [B, S] int64 assigned classes, ``num_classes`` for background.
            target_boxes: [B, S, 4] assigned boxes, xyxy pixels.

        Returns:
            The weighted losses, float32 scalars.
        """
        positive = labels < self.num_classes  # [B, S]
        num_positives = positive.sum(dim=1).clamp(min=1).sum().float()
        num_positives = reduce_mean(num_positives)

        loss_cls = (focal_loss(logits, labels) * valid).sum() / num_positives

        anchors = anchors.expand_as(target_boxes)[positive]  # [P, 4]
        target_boxes = target_boxes[positive]
        centerness_targets = _centerness(anchors, target_boxes)
        pred_boxes = self.box2box_transform.apply_deltas(deltas[positive], anchors)
        loss_box = (generalized_box_iou_loss(pred_boxes, target_boxes) * centerness_targets).sum()
        loss_box = loss_box / reduce_mean(centerness_targets.sum()).clamp(min=1)

        loss_centerness = F.binary_cross_entropy_with_logits(centerness[positive], centerness_targets, reduction="sum")
        losses = {"loss_cls": loss_cls, "loss_box": loss_box, "loss_centerness": loss_centerness / num_positives}
        return {name: loss * self.loss_weights[name] for name, loss in losses.items()}

    @torch.no_grad()
    def inference(self, pyramid: FeaturePyramid) -> list[Instances]:
        """See the base class."""
        maps = pyramid.maps()
        anchors = [x.tensor for x in self.anchor_generator(maps)]
        predictions = self.predict(maps)
        return [
            self._inference_single_image(size, anchors, [[x[i] for x in level] for level in predictions])
            for i, size in enumerate(pyramid.geometry.image_sizes)
        ]

    def _inference_single_image(
        self, image_size: tuple[int, int], anchors: list[Tensor], predictions: list[list[Tensor]]
    ) -> Instances:
        boxes, scores, classes = [], [], []
        for level_anchors, (logits, deltas, centerness) in zip(anchors, predictions):
            probabilities = logits.sigmoid().flatten()  # [cells * K]
            # Centre-ness is for the ranking of detections, not for the choice of those that enter it.
            top, index = probabilities.topk(min(self.pre_nms_topk, len(probabilities)))
            cell = index // self.num_classes
            boxes.append(self.box2box_transform.apply_deltas(deltas[cell], level_anchors[cell]))
            scores.append(top * centerness[cell].sigmoid())
            classes.append(index % self.num_classes)
        boxes, scores, classes = Boxes(torch.cat(boxes)), torch.cat(scores), torch.cat(classes)
        boxes.clip(image_size)
        keep = boxes.nonempty()
        boxes, scores, classes = boxes[keep], scores[keep], classes[keep]
        if self.soft_nms:
            keep, scores = soft_nms(boxes.tensor, scores, classes, self.nms_thresh)
        else:
            keep = batched_nms(boxes.tensor, scores, classes, self.nms_thresh)
            scores = scores[keep]
        result = Instances(image_size, pred_boxes=boxes[keep], scores=scores, pred_classes=classes[keep])
        return result[: self.detections_per_image]


def _centerness(anchors: Tensor, gt_boxes: Tensor) -> Tensor:
    """How central [P, 4] boxes ``gt_boxes`` have the centres of [P, 4] ``anchors``: [P], from 0 (border) to 1."""
    centers = (anchors[:, :2] + anchors[:, 2:]) / 2
    left_top, right_bottom = centers - gt_boxes[:, :2], gt_boxes[:, 2:] - centers
    ratios = torch.minimum(left_top, right_bottom) / torch.maximum(left_top, right_bottom)  # horizontal, vertical
    return ratios.prod(dim=1).sqrt()


@AUX_HEAD_REGISTRY.register()
def atss(cfg: CfgNode, input_shapes: list[ShapeSpec]) -> ATSSHead:
    """The auxiliary head that a config calls ``atss``."""
    return ATSSHead(cfg, input_shapes)
