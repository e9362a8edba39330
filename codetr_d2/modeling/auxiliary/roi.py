"""The Faster R-CNN auxiliary head: detectron2's region proposal network and ROI heads with the published rules."""

import math

import torch
from detectron2.config import CfgNode, configurable
from detectron2.layers import ROIAlign, ShapeSpec
from detectron2.modeling import (
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
    build_proposal_generator,
    build_roi_heads,
)
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.proposal_generator import RPN
from detectron2.modeling.proposal_generator.proposal_utils import (
    add_ground_truth_to_proposals,
    find_top_rpn_proposals,
)
from detectron2.modeling.roi_heads import StandardROIHeads
from detectron2.structures import Boxes, ImageList, Instances
from torch import Tensor, nn

from ...distributed import reduce_mean
from ...errors import InputError
from ...layers import soft_nms
from ...ops import roi_align
from ...option_checks import one_of, within
from ..assigners.max_iou import MaxIoUMatcher
from ..facts import ClassRows
from ..pyramid import FeaturePyramid
from ..structures import PositiveSamples
from .anchors import valid_anchors
from .base import AUX_HEAD_REGISTRY, AnchorSizes, AuxiliaryHead

__all__ = ["CoROIHeads", "CoRPN", "ROIHead"]


@PROPOSAL_GENERATOR_REGISTRY.register()
class CoRPN(RPN):
    """detectron2's region proposal network as Co-DETR was published with it. It differs in these rules:

    * a ground truth's best anchors belong to that ground truth, and only from the lower IoU threshold on
      (:class:`MaxIoUMatcher`);
    * anchors of cells in the padding of an image are neither positive nor negative;
    * losses are divided by the number of anchors that were really sampled (at least one positive and one negative in
      each image), averaged over the processes, not by the size of the sample that was asked for;
    * non-maximum suppression may have another threshold at inference than in training.

    Losses and proposals are computed in float32 under autocast too.
    """

    @configurable
    def __init__(self, *, nms_thresh: tuple[float, float] = (0.7, 0.7), **kwargs) -> None:
        """
        Args:
            nms_thresh: IoU above which the lower of two proposals is suppressed, in training and at inference.
            kwargs: those of ``RPN``.
        """
        super().__init__(**kwargs)
        self.nms_thresh = {True: nms_thresh[0], False: nms_thresh[1]}

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        ret = super().from_config(cfg, input_shape)
        ret["nms_thresh"] = (cfg.MODEL.RPN.NMS_THRESH, cfg.MODEL.RPN.NMS_THRESH_TEST)
        thresholds = cfg.MODEL.RPN.IOU_THRESHOLDS
        ret["anchor_matcher"] = MaxIoUMatcher(thresholds, cfg.MODEL.RPN.IOU_LABELS, min_pos_iou=thresholds[0])
        return ret

    @torch.no_grad()
    def label_and_sample_anchors(
        self, anchors: list[Boxes], gt_instances: list[Instances]
    ) -> tuple[list[Tensor], list[Tensor]]:
        """See the base class; anchors in the padding of their image are labelled -1, to be ignored."""
        all_anchors = Boxes.cat(anchors)
        gt_labels, matched_gt_boxes = [], []
        for targets in gt_instances:
            valid = torch.cat(
                valid_anchors(
                    anchors, self.anchor_generator.strides, targets.image_size, offset=self.anchor_generator.offset
                )
            )
            [valid_labels], [valid_boxes] = super().label_and_sample_anchors([all_anchors[valid]], [targets])
            gt_labels.append(valid_labels.new_full((len(valid),), -1).masked_scatter_(valid, valid_labels))
            matched_gt_boxes.append(torch.zeros_like(all_anchors.tensor).masked_scatter_(valid[:, None], valid_boxes))
        return gt_labels, matched_gt_boxes

    def losses(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        gt_labels: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        gt_boxes: list[Tensor],
    ) -> dict[str, Tensor]:
        """See the base class."""
        losses = super().losses(
            anchors,
            [x.float() for x in pred_objectness_logits],
            gt_labels,
            [x.float() for x in pred_anchor_deltas],
            gt_boxes,
        )
        labels = torch.stack(gt_labels)  # [B, anchors]
        num_sampled = (labels == 1).sum(1).clamp(min=1) + (labels == 0).sum(1).clamp(min=1)
        asked_for = self.batch_size_per_image * len(gt_labels)  # what the base class divides by
        scale = asked_for / reduce_mean(num_sampled.sum().float())
        return {name: loss * scale for name, loss in losses.items()}

    def predict_proposals(
        self,
        anchors: list[Boxes],
        pred_objectness_logits: list[Tensor],
        pred_anchor_deltas: list[Tensor],
        image_sizes: list[tuple[int, int]],
    ) -> list[Instances]:
        """See the base class."""
        with torch.no_grad():
            return find_top_rpn_proposals(
                self._decode_proposals(anchors, pred_anchor_deltas),
                [x.float() for x in pred_objectness_logits],
                image_sizes,
                self.nms_thresh[self.training],
                self.pre_nms_topk[self.training],
                self.post_nms_topk[self.training],
                self.min_box_size,
                self.training,
            )


class CoROIAlign(ROIAlign):
    """detectron2's ROIAlign by the operator of this project, :func:`codetr_d2.ops.roi_align`."""

    def forward(self, input: Tensor, rois: Tensor) -> Tensor:
        """See the base class."""
        rois = rois.to(input.dtype)
        return roi_align(input, rois, self.output_size, self.spatial_scale, self.sampling_ratio, self.aligned)


class CoROIPooler(ROIPooler):
    """detectron2's pooler of several levels, on :class:`CoROIAlign`.

    torchvision's operator would copy the maps, which lie channels last, and its backward pass on CPUs is slow.
    """

    def __init__(self, output_size: int, scales: list[float], sampling_ratio: int, pooler_type: str) -> None:
        """
        Args:
            output_size: side of a pooled region, in cells.
            scales: 1 / stride of each level, from fine to coarse.
            sampling_ratio: samples along a side of a cell; 0: as many as the region needs.
            pooler_type: "ROIAlign", or "ROIAlignV2", which is shifted by half a pixel.
        """
        super().__init__(output_size, scales, sampling_ratio, pooler_type)
        aligned = pooler_type == "ROIAlignV2"
        self.level_poolers = nn.ModuleList(
            [CoROIAlign(self.output_size, scale, sampling_ratio, aligned) for scale in scales]
        )


@ROI_HEADS_REGISTRY.register()
class CoROIHeads(StandardROIHeads):
    """detectron2's ROI heads as Co-DETR was published with them. They differ in these rules:

    * ground-truth boxes come before the proposals, not after them;
    * losses are divided by the number of sampled ROIs averaged over the processes.

    In training, the sampled proposals that are returned also have a field ``pooled_features``, [R, C]: the pooled
    feature of the box head averaged over the ROI, with its gradient. Losses are float32 under autocast too.
    """

    @configurable
    def __init__(self, *, proposal_prepend_gt: bool = True, soft_nms: bool = False, **kwargs) -> None:
        """
        Args:
            proposal_prepend_gt: put the ground-truth boxes before the proposals in training.
            soft_nms: lower the scores of detections that overlap instead of dropping them
                (:func:`codetr_d2.layers.soft_nms`).
            kwargs: those of ``StandardROIHeads``.
        """
        super().__init__(**kwargs, proposal_append_gt=False)
        self.proposal_prepend_gt = proposal_prepend_gt
        self.soft_nms = soft_nms

    @classmethod
    def check_options(cls, cfg: CfgNode) -> None:
        if cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES:
            raise InputError("MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES: CoROIHeads has no such training; set it to False")
        for part in ("BOX", "MASK") if cfg.MODEL.MASK_ON else ("BOX",):
            one_of(cfg, f"MODEL.ROI_{part}_HEAD.POOLER_TYPE", ["ROIAlign", "ROIAlignV2"])

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shape: dict[str, ShapeSpec]) -> dict:
        cls.check_options(cfg)
        ret = super().from_config(cfg, input_shape)
        ret["proposal_prepend_gt"] = ret.pop("proposal_append_gt")
        ret["soft_nms"] = cfg.MODEL.ROI_HEADS.SOFT_NMS
        for part in ("BOX", "MASK") if cfg.MODEL.MASK_ON else ("BOX",):
            options = cfg.MODEL[f"ROI_{part}_HEAD"]
            scales = [1 / input_shape[name].stride for name in cfg.MODEL.ROI_HEADS.IN_FEATURES]
            ret[f"{part.lower()}_pooler"] = CoROIPooler(
                options.POOLER_RESOLUTION, scales, options.POOLER_SAMPLING_RATIO, options.POOLER_TYPE
            )
        return ret

    @torch.no_grad()
    def label_and_sample_proposals(self, proposals: list[Instances], targets: list[Instances]) -> list[Instances]:
        """See the base class."""
        if not self.mask_on:  # masks that nobody reads would be copied for every sampled ROI
            targets = [Instances(x.image_size, gt_boxes=x.gt_boxes, gt_classes=x.gt_classes) for x in targets]
        if self.proposal_prepend_gt:
            # detectron2's function appends; rolling the rows brings them to the front.
            proposals = [
                x[torch.arange(len(x), device=x.proposal_boxes.device).roll(len(gt))]
                for x, gt in zip(add_ground_truth_to_proposals(targets, proposals), targets)
            ]
        return super().label_and_sample_proposals(proposals, targets)

    def sample(
        self, features: dict[str, Tensor], proposals: list[Instances], targets: list[Instances]
    ) -> list[Instances]:
        """The sampled proposals of training, with their pooled features, without predictions and losses."""
        proposals = self.label_and_sample_proposals(proposals, targets)
        self._pool(features, proposals)
        return proposals

    def _pool(self, features: dict[str, Tensor], proposals: list[Instances]) -> Tensor:
        """[R, C, 7, 7] features of the proposals, whose means these get in training."""
        # ROIAlign rounds the boxes to the type of the features: 8 bits of a coordinate are not enough.
        maps = [features[name].float() for name in self.box_in_features]
        pooled = self.box_pooler(maps, [x.proposal_boxes for x in proposals])
        if self.training:
            for x, feature in zip(proposals, pooled.mean(dim=(2, 3)).split([len(x) for x in proposals])):
                x.pooled_features = feature
        return pooled

    def _forward_box(
        self, features: dict[str, Tensor], proposals: list[Instances]
    ) -> "dict[str, Tensor] | list[Instances]":
        predictions = tuple(x.float() for x in self.box_predictor(self.box_head(self._pool(features, proposals))))
        if not self.training:
            if self.soft_nms:
                return self._soft_nms_inference(predictions, proposals)
            return self.box_predictor.inference(predictions, proposals)[0]

        # The losses are means over this process's ROIs; see reduce_mean for what this makes of them.
        count = sum(len(x) for x in proposals)
        scale = count / reduce_mean(predictions[0].new_tensor(float(count))).clamp(min=1)
        losses = self.box_predictor.losses(predictions, proposals)
        return {name: loss * scale for name, loss in losses.items()}

    def _soft_nms_inference(self, predictions: tuple[Tensor, Tensor], proposals: list[Instances]) -> list[Instances]:
        """What the box predictor's inference does, with soft-NMS in the place of NMS."""
        predictor, results = self.box_predictor, []
        all_boxes = predictor.predict_boxes(predictions, proposals)  # of each image [R, 4 * K], or [R, 4] for all
        for boxes, scores, x in zip(all_boxes, predictor.predict_probs(predictions, proposals), proposals):
            region, classes = torch.nonzero(scores[:, :-1] > predictor.test_score_thresh, as_tuple=True)
            boxes = boxes.view(len(boxes), -1, 4).expand(-1, self.num_classes, -1)
            found = Instances(x.image_size, pred_boxes=Boxes(boxes[region, classes]), pred_classes=classes)
            found.pred_boxes.clip(x.image_size)
            scores = scores[region, classes]
            kept, scores = soft_nms(found.pred_boxes.tensor, scores, classes, predictor.test_nms_thresh)
            found = found[kept]
            found.scores = scores
            results.append(found[: predictor.test_topk_per_image])
        return results

    def _forward_mask(
        self, features: dict[str, Tensor], instances: list[Instances]
    ) -> "dict[str, Tensor] | list[Instances]":
        if not self.mask_on:
            return super()._forward_mask(features, instances)
        features = {name: features[name].float() for name in self.mask_in_features}  # see _forward_box
        if not self.training:
            return super()._forward_mask(features, instances)
        count = sum((x.gt_classes < self.num_classes).sum() for x in instances).float()
        scale = count / reduce_mean(count).clamp(min=1)
        return {name: loss.float() * scale for name, loss in super()._forward_mask(features, instances).items()}


@AUX_HEAD_REGISTRY.register("roi")
class ROIHead(AuxiliaryHead):
    """Faster R-CNN as an auxiliary head.

    Proposals come from all levels of the pyramid, ROIs are pooled from all but the coarsest. Its candidates for the
    decoder are the ROIs that were sampled in training, positives first: a proposal's box as it was before its
    regression, and its pooled feature.

    With ``MODEL.MASK_ON`` and ``MODEL.CODETR.MASK_HEAD`` "roi" it has Mask R-CNN's branch, whose masks of the positive
    ROIs are trained and which also predicts the masks of other detections, see :meth:`predict_masks`.

    Losses: ``loss_rpn_cls``, ``loss_rpn_box``, ``loss_cls``, ``loss_box``, and with masks ``loss_mask``.

    Source: paper, section 3.2 and table 1.
    """

    PUBLISHED_NAMES = [
        ("rpn_head.rpn_conv.{rest}", "proposal_generator.rpn_head.conv.{rest}"),
        ("rpn_head.rpn_cls.{rest}", "proposal_generator.rpn_head.objectness_logits.{rest}"),
        ("rpn_head.rpn_reg.{rest}", "proposal_generator.rpn_head.anchor_deltas.{rest}"),
        ("roi_head.0.bbox_head.fc_cls.{rest}", "roi_heads.box_predictor.cls_score.{rest}"),
        ("roi_head.0.bbox_head.fc_reg.{rest}", "roi_heads.box_predictor.bbox_pred.{rest}"),
        ("roi_head.0.bbox_head.shared_fcs.{norm}.{rest}", "roi_heads.box_head.fc{norm}.{rest}"),
        ("roi_head.0.bbox_head.shared_convs.{norm}.gn.{rest}", "roi_heads.box_head.conv{norm}.norm.{rest}"),
        ("roi_head.0.bbox_head.shared_convs.{norm}.conv.{rest}", "roi_heads.box_head.conv{norm}.{rest}"),
        ("roi_head.0.mask_head.convs.{norm}.conv.{rest}", "roi_heads.mask_head.mask_fcn{norm}.{rest}"),
        ("roi_head.0.mask_head.upsample.{rest}", "roi_heads.mask_head.deconv.{rest}"),
        ("roi_head.0.mask_head.conv_logits.{rest}", "roi_heads.mask_head.predictor.{rest}"),
    ]
    OPTIONS_OF_SHAPES = {
        "roi_heads.box_predictor.bbox_pred": "MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG",
        "roi_heads.mask_head.predictor": "MODEL.ROI_MASK_HEAD.CLS_AGNOSTIC_MASK",
        "roi_heads.mask_head": "MODEL.ROI_MASK_HEAD.CONV_DIM",
        "roi_heads.box_head": "MODEL.ROI_BOX_HEAD (NUM_CONV, CONV_DIM, NUM_FC, FC_DIM, POOLER_RESOLUTION)",
        "proposal_generator.rpn_head.objectness_logits": "MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS",
        "proposal_generator.rpn_head.anchor_deltas": "MODEL.ANCHOR_GENERATOR.SIZES and ASPECT_RATIOS",
    }
    OPTIONS_OF_NAMES = {"roi_heads.box_head": "MODEL.ROI_BOX_HEAD.NUM_CONV and NUM_FC"}
    OPTIONAL_PARTS = {"roi_heads.mask_head": "a mask branch; MODEL.MASK_ON is False"}

    @classmethod
    def check_options(cls, cfg: CfgNode) -> None:
        one_of(cfg, "MODEL.ROI_BOX_HEAD.NAME", [name for name, _ in ROI_BOX_HEAD_REGISTRY])  # "" by default
        if cfg.MODEL.MASK_ON and cfg.MODEL.CODETR.MASK_HEAD == "roi":
            one_of(cfg, "MODEL.ROI_MASK_HEAD.NAME", [name for name, _ in ROI_MASK_HEAD_REGISTRY])
        within(cfg, 0, 1, "MODEL.RPN.NMS_THRESH_TEST")

    def class_rows(self) -> dict[str, ClassRows]:
        return {
            "roi_heads.box_predictor.cls_score": ClassRows(extra=1),  # the last row is background
            "roi_heads.box_predictor.bbox_pred": ClassRows(per_class=4),
            "roi_heads.mask_head.predictor": ClassRows(),
        }

    @configurable
    def __init__(self, *, proposal_generator: nn.Module, roi_heads: CoROIHeads, level_names: list[str]) -> None:
        """
        Args:
            proposal_generator: a detectron2 proposal generator on feature maps of the names ``level_names``.
            roi_heads: detectron2 ROI heads on some of these maps, which give the sampled proposals a field
                ``pooled_features``.
            level_names: name of each level of the pyramid, from fine to coarse.
        """
        super().__init__()
        self.proposal_generator = proposal_generator
        self.roi_heads = roi_heads
        self.level_names = level_names

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shapes: list[ShapeSpec]) -> dict:
        strides = [shape.stride for shape in input_shapes]
        if any(b != 2 * a for a, b in zip(strides, strides[1:])):
            raise InputError(
                f"MODEL.CODETR.IN_FEATURES gives levels of the strides {strides}, but the ROI auxiliary head needs "
                'each twice as coarse as the one before; name others, or leave "roi" out of MODEL.CODETR.AUX_HEADS'
            )
        level_names = [f"p{int(math.log2(stride))}" for stride in strides]
        for key in ("SIZES", "ASPECT_RATIOS"):
            given = cfg.MODEL.ANCHOR_GENERATOR[key]
            if len(given) not in (1, len(level_names)):
                raise InputError(
                    f"MODEL.ANCHOR_GENERATOR.{key} lists {len(given)} levels, but the auxiliary heads have "
                    f"{len(level_names)}: give one list for each level, or one for all"
                )
        cfg = cfg.clone()
        cfg.defrost()
        cfg.MODEL.RPN.IN_FEATURES = level_names
        cfg.MODEL.ROI_HEADS.IN_FEATURES = level_names[:-1]
        cfg.MODEL.ROI_HEADS.NUM_CLASSES = cfg.MODEL.CODETR.NUM_CLASSES
        cfg.MODEL.MASK_ON = cfg.MODEL.MASK_ON and cfg.MODEL.CODETR.MASK_HEAD == "roi"
        cfg.VIS_PERIOD = 0  # detectron2's mask branch would show every mask of a batch by itself, hundreds of them
        shapes = dict(zip(level_names, input_shapes))
        roi_heads = build_roi_heads(cfg, shapes)
        if not isinstance(roi_heads, CoROIHeads):
            raise InputError(
                f"MODEL.ROI_HEADS.NAME: {cfg.MODEL.ROI_HEADS.NAME} hands no features on to the decoder; "
                "choose CoROIHeads"
            )
        return {
            "proposal_generator": build_proposal_generator(cfg, shapes),
            "roi_heads": roi_heads,
            "level_names": level_names,
        }

    def anchor_sizes(self) -> AnchorSizes:
        """See the base class."""
        anchors = torch.cat(list(self.proposal_generator.anchor_generator.cell_anchors))
        least_overlap = min(self.proposal_generator.anchor_matcher.thresholds[1:-1])
        return AnchorSizes("MODEL.ANCHOR_GENERATOR.SIZES", anchors[:, 2:] - anchors[:, :2], least_overlap)

    def _inputs(self, pyramid: FeaturePyramid) -> tuple[ImageList, dict[str, Tensor]]:
        # detectron2's heads read nothing but the sizes from the images.
        return ImageList(pyramid.tokens, pyramid.geometry.image_sizes), dict(zip(self.level_names, pyramid.maps()))

    def forward(self, pyramid: FeaturePyramid, targets: list[Instances]) -> tuple[dict[str, Tensor], PositiveSamples]:
        """See the base class."""
        images, features = self._inputs(pyramid)
        proposals, rpn_losses = self._propose(pyramid, targets)
        proposals, roi_losses = self.roi_heads(images, features, proposals, targets)
        names = {"loss_rpn_loc": "loss_rpn_box", "loss_box_reg": "loss_box"}
        losses = {names.get(name, name): loss for name, loss in {**rpn_losses, **roi_losses}.items()}
        return losses, self._candidates(proposals)

    def candidates(self, pyramid: FeaturePyramid, targets: list[Instances]) -> PositiveSamples:
        """See the base class."""
        with torch.no_grad():
            proposals, _ = self._propose(pyramid, targets)
        _, features = self._inputs(pyramid)
        return self._candidates(self.roi_heads.sample(features, proposals, targets))

    def _propose(self, pyramid: FeaturePyramid, targets: list[Instances]) -> tuple[list[Instances], dict[str, Tensor]]:
        # Where anchors may lie is the pyramid's affair: cells that an image reaches with its own padding.
        anchor_targets = [Instances(size, **x.get_fields()) for size, x in zip(pyramid.geometry.padded_sizes, targets)]
        return self.proposal_generator(*self._inputs(pyramid), anchor_targets)

    def _candidates(self, proposals: list[Instances]) -> PositiveSamples:
        boxes = [x.proposal_boxes.tensor for x in proposals]
        return PositiveSamples(
            boxes=boxes,
            labels=[x.gt_classes for x in proposals],
            target_boxes=[
                x.gt_boxes.tensor if x.has("gt_boxes") else torch.zeros_like(box) for x, box in zip(proposals, boxes)
            ],
            features=[x.pooled_features for x in proposals],
        )

    @torch.no_grad()
    def inference(self, pyramid: FeaturePyramid) -> list[Instances]:
        """See the base class."""
        images, features = self._inputs(pyramid)
        proposals, _ = self.proposal_generator(images, features)
        return self.roi_heads._forward_box(features, proposals)  # masks are the caller's to ask for

    def class_logits(self, pyramid: FeaturePyramid) -> list[Tensor]:
        """See the base class: of the proposals, which carry no gradient, against the logit of background."""
        images, features = self._inputs(pyramid)
        with torch.no_grad():
            proposals, _ = self.proposal_generator(images, features)
        heads = self.roi_heads
        logits, _ = heads.box_predictor(heads.box_head(heads._pool(features, proposals)))
        return list((logits[:, :-1] - logits[:, -1:]).split([len(x) for x in proposals]))

    @torch.no_grad()
    def predict_masks(self, pyramid: FeaturePyramid, detections: list[Instances]) -> list[Instances]:
        """Add the masks of any detections, in eval mode.

        Args:
            pyramid: features of B images; masks don't use the coarsest level.
            detections: of each image, ``pred_boxes`` (xyxy pixels of the network input) and ``pred_classes``.

        Returns:
            The detections with ``pred_masks``, [N, 1, M, M] probabilities inside the boxes.
        """
        _, features = self._inputs(pyramid)
        return self.roi_heads.forward_with_given_boxes(features, detections)
