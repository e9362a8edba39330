"""What all one-stage auxiliary heads have in common."""

import math
from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import torch
from detectron2.config import CfgNode
from detectron2.layers import Conv2d, ShapeSpec, batched_nms
from detectron2.modeling.anchor_generator import DefaultAnchorGenerator
from detectron2.structures import Boxes, Instances
from torch import Tensor, nn
from torch.nn import functional as F
from torch.utils.checkpoint import checkpoint

from ...errors import InputError
from ...layers import conv3x3, soft_nms
from ...option_checks import option, positive, share, within
from ..pyramid import FeaturePyramid, Geometry
from ..structures import PositiveSamples
from .anchors import valid_anchors
from .base import AnchorSizes, AuxiliaryHead

__all__ = ["BACKGROUND", "IGNORED", "DenseHead", "DenseTargets"]

# What an assignment may hold beside indices of objects.
BACKGROUND, IGNORED = -1, -2


@dataclass
class DenseTargets:
    """What the S anchors of B images are trained towards.

    Attributes:
        anchors: [S, 4] float32, xyxy pixels of the network input.
        is_trained: [B, S] bool, False for anchors that take no part: in the padding, or ignored by the assignment.
        labels: [B, S] int64 assigned classes, ``num_classes`` for background and whatever takes no part.
        boxes: [B, S, 4] float32 assigned boxes, xyxy pixels; zero where there is none.
        is_positive: [B, S] bool, True where an object is assigned.
    """

    anchors: Tensor
    is_trained: Tensor
    labels: Tensor
    boxes: Tensor
    is_positive: Tensor

    def positives(self) -> tuple[Tensor, Tensor]:
        """The anchors [P, 4] of the positives and their assigned boxes [P, 4], image by image."""
        return self.anchors.expand_as(self.boxes)[self.is_positive], self.boxes[self.is_positive]


class DenseHead(AuxiliaryHead):
    """A one-stage head: each cell of the pyramid has the same number of anchors, each with a class and a box.

    A head that starts from points uses square anchors around them, which are then its candidates for the decoder.
    Here are the towers of convolutions, the classifier, which anchors lie in the padding, the loop over the images, the
    candidates, and everything of inference from the choice of each level's best to the limit of detections. The
    candidates are all anchors, in the order of the tokens, which are the features of their cells; those that take no
    part in training are background, and their boxes all zero.

    A subclass gives:

    * in its constructor the anchor generator, and predictors on the box tower made by :meth:`predictor`;
    * :meth:`predict_boxes`: what these predict on a level, beside the class;
    * :meth:`assign`: which anchor answers for which object of an image;
    * :meth:`losses`: its losses, given that;
    * :meth:`decode`: its box predictions as boxes;
    * ``options``, the name of its node of the config below ``MODEL``, and ``loss_names``; ``topk_option``, where that
      is not the name of the option of ``pre_nms_topk``;

    and where it differs from the rule here :meth:`training_sizes`, :meth:`refine`, :meth:`score`, :meth:`select` and
    :meth:`suppress`. It may be called under autocast: all these methods get float32.
    """

    options: str
    topk_option = "PRE_NMS_TOPK_TEST"
    least_overlap = 0.1  # an anchor that overlaps an object by less says next to nothing about it
    loss_names: tuple[str, ...]

    def __init__(
        self,
        *,
        in_channels: int,
        strides: list[int],
        num_classes: int,
        anchor_generator: DefaultAnchorGenerator,
        loss_weights: dict[str, float],
        num_convs: int = 1,
        norm: bool = True,
        conv_bias: bool = False,
        score_thresh: float = 0.0,
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
            anchor_generator: makes the anchors of each level, cell by cell; as many for each cell of each level.
            loss_weights: factor of each loss, by its name.
            num_convs: stacked convolutions before the predictors, of the classes and of the boxes.
            norm: whether each has a GroupNorm.
            conv_bias: whether each has a bias.
            score_thresh: class probability that a detection must exceed.
            pre_nms_topk: (anchor, class) pairs of each level that go into non-maximum suppression.
            nms_thresh: IoU above which the lower score of a class is suppressed.
            soft_nms: lower that score instead (:func:`codetr_d2.layers.soft_nms`).
            detections_per_image: the largest number of detections of an image.
        """
        super().__init__()
        self.in_channels = in_channels
        self.strides = strides
        self.num_classes = num_classes
        self.anchor_generator = anchor_generator
        self.anchors_per_cell = anchor_generator.num_anchors[0]
        self.loss_weights = loss_weights
        self.score_thresh = score_thresh
        self.pre_nms_topk = pre_nms_topk
        self.nms_thresh = nms_thresh
        self.soft_nms = soft_nms
        self.detections_per_image = detections_per_image

        def tower() -> nn.Sequential:
            convs = []
            for _ in range(num_convs):
                group_norm = nn.GroupNorm(math.gcd(32, in_channels // 2), in_channels) if norm else None
                conv = Conv2d(
                    in_channels, in_channels, 3, padding=1, bias=conv_bias, norm=group_norm, activation=F.relu
                )
                convs.append(_initialize(conv))
            return nn.Sequential(*convs)

        self.cls_tower = tower()
        self.box_tower = tower()
        self.cls_score = self.predictor(num_classes)
        nn.init.constant_(self.cls_score.bias, -math.log(99))  # a probability of 0.01

    @classmethod
    def check_options(cls, cfg: CfgNode) -> None:
        """Check the options that every one-stage head has in its node of the config."""
        node = f"MODEL.{cls.options}"
        within(cfg, 0, math.inf, f"{node}.NUM_CONVS", *(f"{node}.{name.upper()}" for name in cls.loss_names))
        within(cfg, 0, 1, f"{node}.NMS_THRESH_TEST")
        share(cfg, f"{node}.SCORE_THRESH_TEST")
        positive(cfg, f"{node}.{cls.topk_option}")
        weights = option(cfg, node).get("BBOX_REG_WEIGHTS", (1.0,) * 4)
        if len(weights) != 4 or any(x <= 0 for x in weights):
            raise InputError(
                f"{node}.BBOX_REG_WEIGHTS is {weights}; it must have four entries greater than 0: for x, y, width and "
                "height"
            )

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shapes: list[ShapeSpec]) -> dict:
        """The arguments that every one-stage head takes from its node of the config."""
        options = cfg.MODEL[cls.options]
        return {
            "in_channels": input_shapes[0].channels,
            "strides": [shape.stride for shape in input_shapes],
            "num_classes": cfg.MODEL.CODETR.NUM_CLASSES,
            "num_convs": options.NUM_CONVS,
            "loss_weights": {name: options[name.upper()] for name in cls.loss_names},
            "score_thresh": options.SCORE_THRESH_TEST,
            "pre_nms_topk": options[cls.topk_option],
            "nms_thresh": options.NMS_THRESH_TEST,
            "soft_nms": options.SOFT_NMS,
            "detections_per_image": cfg.TEST.DETECTIONS_PER_IMAGE,
        }

    def anchor_sizes(self) -> AnchorSizes | None:
        """See the base class."""
        anchors = torch.cat(list(self.anchor_generator.cell_anchors))
        return AnchorSizes(f"MODEL.{self.options}.ANCHOR_SCALE", anchors[:, 2:] - anchors[:, :2], self.least_overlap)

    def predictor(self, channels: int) -> nn.Conv2d:
        """A convolution, initialised, that predicts ``channels`` numbers for each anchor of a cell."""
        return _initialize(nn.Conv2d(self.in_channels, self.anchors_per_cell * channels, kernel_size=3, padding=1))

    def forward(self, pyramid: FeaturePyramid, targets: list[Instances]) -> tuple[dict[str, Tensor], PositiveSamples]:
        """See the base class."""
        predictions, dense_targets = self.predict_and_assign(pyramid, targets)
        losses = {name: x * self.loss_weights[name] for name, x in self.losses(predictions, dense_targets).items()}
        return losses, self._candidates(pyramid, dense_targets)

    def candidates(self, pyramid: FeaturePyramid, targets: list[Instances]) -> PositiveSamples:
        """See the base class."""
        with torch.no_grad():
            _, dense_targets = self.predict_and_assign(pyramid, targets)
        return self._candidates(pyramid, dense_targets)

    def predict_and_assign(
        self, pyramid: FeaturePyramid, targets: list[Instances]
    ) -> tuple[list[Tensor], DenseTargets]:
        """The predictions and targets of training, as :meth:`losses` gets them."""
        maps = pyramid.maps()
        predictions = [torch.cat(levels, dim=1) for levels in zip(*self.predict(maps))]
        return predictions, self.targets(pyramid.geometry, self.anchor_generator(maps), predictions, targets)

    def _candidates(self, pyramid: FeaturePyramid, targets: DenseTargets) -> PositiveSamples:
        return PositiveSamples(
            boxes=[targets.anchors * x[:, None] for x in targets.is_trained],
            labels=list(targets.labels),
            target_boxes=list(targets.boxes),
            features=list(pyramid.tokens),
        )

    def predict(self, maps: list[Tensor]) -> list[tuple[Tensor, ...]]:
        """The raw predictions on feature maps [B, C, height, width].

        Returns:
            For each level of N anchors: class logits [B, N, K], box predictions [B, N, D], and each further prediction
            of :meth:`predict_boxes`, [B, N]. All float32.
        """
        predictions = []
        for level, x in enumerate(maps):
            boxes, *others = _through(self.box_tower, x, partial(self.predict_boxes, level=level))
            boxes, *others = (_rows(x, self.anchors_per_cell) for x in (boxes, *others))
            predictions.append((self.predict_classes(x), boxes, *(x.squeeze(2) for x in others)))
        return predictions

    def predict_classes(self, x: Tensor) -> Tensor:
        """[B, C, height, width] -> [B, N, K] class logits, float32."""
        return _rows(_through(self.cls_tower, x, partial(_convolve, self.cls_score)), self.anchors_per_cell)

    @torch.no_grad()
    def targets(
        self, geometry: Geometry, levels: list[Boxes], predictions: list[Tensor], targets: list[Instances]
    ) -> DenseTargets:
        anchors = Boxes.cat(levels).tensor
        inside, assigned = [], []
        for size, target in zip(self.training_sizes(geometry), targets):
            inside.append(torch.cat(valid_anchors(levels, self.strides, size, self.anchor_generator.offset)))
            assigned.append(torch.full(inside[-1].shape, BACKGROUND, dtype=torch.int64, device=anchors.device))
            if len(target):
                # How many these are on each level, without a look at the device.
                counts = [
                    self.anchors_per_cell
                    * math.prod(min(math.ceil(side / stride), cells) for side, cells in zip(size, shape))
                    for stride, shape in zip(self.strides, geometry.shapes)
                ]
                gt_boxes = target.gt_boxes.tensor.to(anchors)
                assigned[-1][inside[-1]] = self.assign(anchors[inside[-1]], counts, gt_boxes)
        assigned = self.refine(torch.stack(assigned), levels, predictions, targets)
        labels, boxes = [], []
        for target, objects in zip(targets, assigned):
            positive = objects >= 0
            labels.append(torch.full_like(objects, self.num_classes))
            labels[-1][positive] = target.gt_classes[objects[positive]]
            boxes.append(torch.zeros_like(anchors))
            boxes[-1][positive] = target.gt_boxes.tensor.to(anchors)[objects[positive]]
        is_trained = torch.stack(inside) & (assigned != IGNORED)
        return DenseTargets(anchors, is_trained, torch.stack(labels), torch.stack(boxes), assigned >= 0)

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

    def class_logits(self, pyramid: FeaturePyramid) -> list[Tensor]:
        """See the base class: of all anchors."""
        return list(torch.cat([logits for logits, *_ in self.predict(pyramid.maps())], dim=1))

    def _inference_single_image(
        self, image_size: tuple[int, int], anchors: list[Tensor], predictions: list[list[Tensor]]
    ) -> Instances:
        boxes, scores, classes = [], [], []
        for level_anchors, level in zip(anchors, predictions):
            anchor, level_classes, level_scores = self.select(*level)
            boxes.append(self.decode(level[1][anchor], level_anchors[anchor]))
            classes.append(level_classes)
            scores.append(level_scores)
        boxes, scores, classes = Boxes(torch.cat(boxes)), torch.cat(scores), torch.cat(classes)
        boxes.clip(image_size)
        keep = boxes.nonempty()
        boxes, scores, classes = self.suppress(boxes.tensor[keep], scores[keep], classes[keep])
        return Instances(image_size, pred_boxes=Boxes(boxes), scores=scores, pred_classes=classes)

    # What a subclass gives.

    def predict_boxes(self, x: Tensor, level: int) -> tuple[Tensor, ...]:
        """What a level predicts beside the classes.

        Args:
            x: [B, C, height, width], from the box tower.
            level: the index of the level, from fine to coarse.

        Returns:
            Box predictions, D for each anchor of a cell: [B, anchors of a cell * D, height, width]. Then any number of
            maps with one number for each, as [B, anchors of a cell, height, width]. Any floating-point type.
        """
        raise NotImplementedError

    def assign(self, anchors: Tensor, anchors_per_level: list[int], gt_boxes: Tensor) -> Tensor:
        """Which objects of an image its anchors answer for. Called without gradients.

        Args:
            anchors: [N, 4] those not in the padding, xyxy pixels, level after level.
            anchors_per_level: the number of anchors of each level; they sum to N.
            gt_boxes: [G, 4] xyxy pixels, G at least 1.

        Returns:
            [N] int64, the index of the assigned object, ``BACKGROUND`` or ``IGNORED``.
        """
        raise NotImplementedError

    def losses(self, predictions: list[Tensor], targets: DenseTargets) -> dict[str, Tensor]:
        """The losses of a batch.

        Args:
            predictions: class logits [B, S, K], box predictions [B, S, D], and each further prediction, [B, S].
            targets: what they are trained towards; there may be no positive.

        Returns:
            float32 scalars by the names in ``loss_names``, without their weights, divided by averages over the
            processes (:func:`codetr_d2.distributed.reduce_mean`). Every prediction is in their graph.
        """
        raise NotImplementedError

    def decode(self, predictions: Tensor, anchors: Tensor) -> Tensor:
        """Box predictions [M, D] of anchors [M, 4] -> boxes [M, 4], xyxy pixels."""
        raise NotImplementedError

    # What a subclass may change.

    def training_sizes(self, geometry: Geometry) -> list[tuple[int, int]]:
        """(height, width) in pixels of the part of each image's maps whose anchors are trained: without the padding."""
        return list(geometry.padded_sizes)

    def refine(
        self, assigned: Tensor, anchors: list[Boxes], predictions: list[Tensor], targets: list[Instances]
    ) -> Tensor:
        """The assignment of a batch where it depends on the predictions too. Called without gradients.

        Args:
            assigned: [B, S] int64 what :meth:`assign` has said; ``BACKGROUND`` in the padding.
            anchors: those of each level; together they are S.
            predictions: as :meth:`losses` gets them.
            targets: the objects of each image.

        Returns:
            [B, S] as ``assigned``.
        """
        return assigned

    def score(self, probabilities: Tensor, *others: Tensor) -> Tensor:
        """The scores that detections are ranked by.

        Args:
            probabilities: [M] class probability of each (anchor, class) pair.
            others: each further prediction of the anchor, [M].
        """
        return probabilities

    def select(self, logits: Tensor, boxes: Tensor, *others: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The (anchor, class) pairs of an image's level that go into non-maximum suppression.

        The class probability decides, not the score.

        Args:
            logits, boxes, others: predictions of the level's N anchors, [N, K], [N, D] and each [N].

        Returns:
            Index of the anchor [M] int64, class [M] int64 and score [M].
        """
        probabilities = logits.sigmoid().flatten()
        probabilities, index = probabilities.topk(min(self.pre_nms_topk, len(probabilities)))
        is_probable = probabilities > self.score_thresh
        probabilities, index = probabilities[is_probable], index[is_probable]
        anchor = index // self.num_classes
        return anchor, index % self.num_classes, self.score(probabilities, *(x[anchor] for x in others))

    def suppress(self, boxes: Tensor, scores: Tensor, classes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """The detections of an image: boxes, scores and classes by falling score, as many as there may be.

        Args:
            boxes: [M, 4] xyxy pixels, not empty, inside the image.
            scores: [M].
            classes: [M] int64.
        """
        if self.soft_nms:
            keep, kept_scores = soft_nms(boxes, scores, classes, self.nms_thresh)
        else:
            keep = batched_nms(boxes, scores, classes, self.nms_thresh)
            kept_scores = scores[keep]
        keep = keep[: self.detections_per_image]
        return boxes[keep], kept_scores[: self.detections_per_image], classes[keep]


def _through(tower: nn.Sequential, x: Tensor, predict: Callable[[Tensor], Any]) -> Any:
    """``predict(tower(x))``, which keeps less for the backward pass.

    Of a normalised convolution its own output is kept, and not what normalisation and activation make of it: that is
    computed anew, which costs little, as the last convolution on it need not be computed again.
    """
    before = None
    for step in (*tower, predict):
        run = step if step is predict else partial(_convolve, step)
        if before is None:
            x = run(x)
        elif before.norm is None or not torch.is_grad_enabled():
            x = run(_finish(before, x))
        else:
            x = checkpoint(_finish_and, before, run, x, use_reentrant=False, preserve_rng_state=False)
        before = step
    return x


def _convolve(conv: Conv2d, x: Tensor) -> Tensor:
    """The convolution alone of detectron2's layer."""
    return conv3x3(x, conv.weight, conv.bias)


def _finish(conv: Conv2d, x: Tensor) -> Tensor:
    """The rest of detectron2's layer."""
    return conv.activation(x if conv.norm is None else conv.norm(x))


def _finish_and(conv: Conv2d, run: Callable[[Tensor], Any], x: Tensor) -> Any:
    return run(_finish(conv, x))


def _rows(x: Tensor, anchors_per_cell: int) -> Tensor:
    """[B, anchors of a cell * D, height, width] -> [B, height * width * anchors of a cell, D] float32."""
    return x.float().flatten(2).unflatten(1, (anchors_per_cell, -1)).permute(0, 3, 1, 2).flatten(1, 2)


def _initialize(conv: nn.Conv2d) -> nn.Conv2d:
    """Start a convolution as focal loss wants it: nearly without influence."""
    nn.init.normal_(conv.weight, std=0.01)
    if conv.bias is not None:
        nn.init.zeros_(conv.bias)
    return conv
