"""Instance masks that are refined at their boundaries: the mask head of Co-DINO-Inst."""

import torch
import torch.nn.functional as F
from detectron2.config import CfgNode, configurable
from detectron2.layers import ShapeSpec, get_norm
from detectron2.modeling.matcher import Matcher
from detectron2.modeling.poolers import ROIPooler
from detectron2.modeling.sampling import subsample_labels
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks, pairwise_iou
from fvcore.nn.weight_init import c2_msra_fill, c2_xavier_fill
from torch import Tensor, nn

from ...distributed import reduce_mean
from ...option_checks import positive
from ..facts import ClassRows
from ..pyramid import FeaturePyramid

__all__ = ["RefineMaskHead", "boundary", "refine_at_boundary"]

_SIZES = (14, 28, 56, 112)  # of the masks, stage by stage
_STAGE_WEIGHTS = (0.5, 0.75, 0.75, 1.0)
_CHUNK = 100  # detections whose masks are predicted at once: some hundred megabytes


class _ConvReLU(nn.Module):
    """Convolution of the same size (but for its stride), with a channel norm in place of the bias if asked, ReLU."""

    def __init__(self, in_dim: int, out_dim: int, kernel: int, stride: int = 1, dilation: int = 1, norm: bool = False):
        super().__init__()
        padding = dilation * (kernel // 2)
        self.conv = nn.Conv2d(in_dim, out_dim, kernel, stride, padding, dilation, bias=not norm)
        if norm:
            self.norm_layer = get_norm("LN", out_dim)
        c2_msra_fill(self.conv)

    def forward(self, x: Tensor) -> Tensor:
        x = self.conv(x)
        return F.relu(self.norm_layer(x) if hasattr(self, "norm_layer") else x)


class _Fusion(nn.Module):
    """Three receptive fields and the average over the ROI, merged. [R, C, s, s] -> the same shape."""

    def __init__(self, dim: int):
        super().__init__()
        self.dilation_conv_1 = _ConvReLU(dim, dim, 3, dilation=1)
        self.dilation_conv_2 = _ConvReLU(dim, dim, 3, dilation=3)
        self.dilation_conv_3 = _ConvReLU(dim, dim, 3, dilation=5)
        self.merge_conv = _ConvReLU(dim, dim, 1)

    def forward(self, x: Tensor) -> Tensor:
        context = x.mean(dim=(2, 3), keepdim=True)
        return self.merge_conv(
            self.dilation_conv_1(x) + self.dilation_conv_2(x) + self.dilation_conv_3(x) + context  # broadcast
        )


class _Stage(nn.Module):
    """Fuses the ROI's features with those of the fine map and the mask so far, to half of the channels.

    Args:
        dim: channels of the ROI's features.
        semantic_dim: channels of the fine map.
    """

    def __init__(self, dim: int, semantic_dim: int):
        super().__init__()
        self.semantic_transform_in = nn.Conv2d(semantic_dim, dim, 1)
        self.fuse_conv = nn.ModuleList([nn.Conv2d(2 * dim + 1, dim, 1), _Fusion(dim)])
        self.fuse_transform_out = nn.Conv2d(dim, dim // 2 - 1, 1)
        for conv in (self.semantic_transform_in, self.fuse_conv[0], self.fuse_transform_out):
            c2_msra_fill(conv)

    def forward(self, x: Tensor, semantic: Tensor, mask: Tensor) -> Tensor:
        """[R, C, s, s] features of the ROI and of the fine map, [R, 1, s, s] mask -> [R, C / 2, s, s]."""
        x = F.relu(self.fuse_conv[0](torch.cat((x, semantic, mask), dim=1)))
        x = F.relu(self.fuse_transform_out(self.fuse_conv[1](x)))
        return torch.cat((x, mask), dim=1)


class _MaskIoUHead(nn.Module):
    """Predicts for each class how well a mask of it covers the object (Mask Scoring R-CNN, arXiv 1903.00241)."""

    def __init__(self, dim: int, num_classes: int):
        super().__init__()
        self.convs = nn.ModuleList([_ConvReLU(dim + 1, dim, 3, norm=True), _ConvReLU(dim, dim, 3, stride=2, norm=True)])
        self.fcs = nn.ModuleList([nn.Linear(dim * (_SIZES[0] // 2) ** 2, 4 * dim)])
        self.fc_mask_iou = nn.Linear(4 * dim, num_classes)
        c2_xavier_fill(self.fcs[0])
        nn.init.normal_(self.fc_mask_iou.weight, std=0.01)
        nn.init.zeros_(self.fc_mask_iou.bias)

    def forward(self, pooled: Tensor, mask: Tensor) -> Tensor:
        """[R, C, 14, 14] features of the ROI, [R, 1, 28, 28] mask probabilities -> [R, K] IoU from 0 to 1."""
        x = torch.cat((pooled, F.max_pool2d(mask, 2)), dim=1)
        for conv in self.convs:
            x = conv(x)
        for layer in self.fcs:
            x = F.relu(layer(x.flatten(1)))
        return self.fc_mask_iou(x).float().sigmoid()


class RefineMaskHead(nn.Module):
    """Masks of given boxes: coarse from the ROI's features, then three times finer with the finest map's help.

    At each stage the mask of the box's class is predicted and, with the features of the finest level at that size, fed
    to the next stage: 14, 28, 56 and 112 pixels on a side, the last one without classes. A finer mask counts only near
    the boundary of the coarser one. A further head predicts the mask's IoU, by which masks are scored.

    All widths are those published for 256 channels, in proportion to ``channels``. Sources: RefineMask
    (arXiv 2104.08569) and Mask Scoring R-CNN (arXiv 1903.00241), in the form published with Co-DINO-Inst.

    Args:
        strides: of the pyramid's levels, from fine to coarse.
        channels: of the pyramid, a multiple of 16.
        num_classes: the number of object classes.
        positives_per_image: at most so many ROIs of each image are trained on.
        iou_threshold: least overlap of a detection with an object whose mask it learns.
        loss_weight: of the masks' losses.
        iou_loss_weight: of the loss of the predicted IoU.
    """

    PUBLISHED_NAMES = [("mask_iou_head.{rest}", "iou_head.{rest}"), ("mask_head.{rest}", "{rest}")]

    @classmethod
    def check_options(cls, cfg: CfgNode) -> None:
        positive(cfg, "MODEL.REFINE_MASK_HEAD.POSITIVES_PER_IMAGE")

    def class_rows(self) -> dict[str, ClassRows]:
        return {
            name: ClassRows() for name in (*(f"stage_instance_logits.{i}" for i in range(3)), "iou_head.fc_mask_iou")
        }

    @configurable
    def __init__(
        self,
        *,
        strides: list[int],
        channels: int,
        num_classes: int,
        positives_per_image: int = 128,
        iou_threshold: float = 0.5,
        loss_weight: float = 12.0,
        iou_loss_weight: float = 6.0,
    ):
        super().__init__()
        self.positives_per_image = positives_per_image
        self.loss_weight = loss_weight
        self.iou_loss_weight = iou_loss_weight
        self.matcher = Matcher([iou_threshold], [0, 1])

        def pooler(size: int, strides: list[int]) -> ROIPooler:
            return ROIPooler(size, [1 / x for x in strides], sampling_ratio=0, pooler_type="ROIAlignV2")

        self.pooler = pooler(_SIZES[0], strides)
        self.semantic_poolers = nn.ModuleList([pooler(size, strides[:1]) for size in _SIZES[:3]])
        self.instance_convs = nn.ModuleList([_ConvReLU(channels, channels, 3, norm=True)])
        self.semantic_convs = nn.ModuleList([_ConvReLU(channels, channels, 3, norm=True) for _ in range(2)])
        dims = [channels, channels // 2, channels // 4]
        self.stages = nn.ModuleList([_Stage(dim, channels) for dim in dims])
        self.stage_instance_logits = nn.ModuleList(
            [*(nn.Conv2d(dim, num_classes, 1) for dim in dims), nn.Conv2d(channels // 8, 1, 1)]
        )
        for layer in self.stage_instance_logits:
            nn.init.normal_(layer.weight, std=0.001)
            nn.init.zeros_(layer.bias)
        self.iou_head = _MaskIoUHead(channels, num_classes)

    @classmethod
    def from_config(cls, cfg: CfgNode, input_shapes: list[ShapeSpec]) -> dict:
        options = cfg.MODEL.REFINE_MASK_HEAD
        return {
            "strides": [x.stride for x in input_shapes],
            "channels": input_shapes[0].channels,
            "num_classes": cfg.MODEL.CODETR.NUM_CLASSES,
            "positives_per_image": options.POSITIVES_PER_IMAGE,
            "loss_weight": options.LOSS_WEIGHT,
            "iou_loss_weight": options.IOU_LOSS_WEIGHT,
        }

    def losses(
        self, memory: FeaturePyramid, detections: list[Instances], targets: list[Instances]
    ) -> dict[str, Tensor]:
        """Losses of the masks of boxes that overlap an object, a random choice of the detections and the objects' own.

        A stage's loss is a binary cross-entropy: the mean over all pixels at 14 and 28 pixels, and from then on over
        the pixels around the boundary, of what was predicted up to the stage before or of the object. Averages are over
        all images of all processes. Gradients reach the features, not the boxes.

        Args:
            memory: the encoder's output for B images.
            detections: of each image, ``pred_boxes``, xyxy pixels of the network input.
            targets: of each image, ``gt_boxes``, ``gt_classes`` and, where it has an object, ``gt_masks``.

        Returns:
            ``loss_mask_14``, ``loss_mask_28``, ``loss_mask_56``, ``loss_mask_112`` and ``loss_mask_iou``, float32
            scalars with every parameter of the head in their graph.
        """
        samples = [self._sample(found, target) for found, target in zip(detections, targets)]
        names = [*(f"loss_mask_{size}" for size in _SIZES), "loss_mask_iou"]
        weights = [*(self.loss_weight * x for x in _STAGE_WEIGHTS), self.iou_loss_weight]
        if any(len(x) for x in samples):
            sums, counts = self._loss_sums(memory, samples)
        else:
            zero = sum(x.sum() for x in self.parameters()).float() * 0.0
            sums, counts = [zero] * len(names), [zero.detach()] * len(names)
        # See reduce_mean for why each process divides by the mean over the processes.
        counts = reduce_mean(torch.stack(counts)).clamp(min=1.0)
        return {name: weight * x / n for name, weight, x, n in zip(names, weights, sums, counts)}

    @torch.no_grad()
    def _sample(self, detections: Instances, targets: Instances) -> Instances:
        """Boxes to train on: ``proposal_boxes`` with the ``gt_classes`` and ``gt_masks`` of the objects in them."""
        boxes = Boxes.cat([targets.gt_boxes, detections.pred_boxes])
        matched, is_positive = self.matcher(pairwise_iou(targets.gt_boxes, boxes))
        chosen, _ = subsample_labels(is_positive.long(), self.positives_per_image, 1.0, bg_label=0)
        samples = Instances(targets.image_size, proposal_boxes=Boxes(boxes.tensor[chosen].detach()))
        samples.gt_classes = targets.gt_classes[matched[chosen]]
        if len(chosen):
            samples.gt_masks = targets.gt_masks[matched[chosen]]
        return samples

    def _loss_sums(self, memory: FeaturePyramid, samples: list[Instances]) -> tuple[list[Tensor], list[Tensor]]:
        """The sums of the four masks' losses and of the IoU's, and how many terms each has."""
        maps = [x.float() for x in memory.maps()]
        labels = torch.cat([x.gt_classes for x in samples])
        logits, ious = self.predict(maps, self.semantic_maps(maps), [x.proposal_boxes for x in samples], labels)
        logits = [x.squeeze(1) for x in logits]  # [R, s, s]
        samples = [x for x in samples if len(x)]
        targets = [
            torch.cat([x.gt_masks.crop_and_resize(x.proposal_boxes.tensor, size) for x in samples]).to(labels.device)
            for size in _SIZES
        ]

        sums, counts = [], []
        merged = logits[1].detach()
        for i, (stage_logits, target) in enumerate(zip(logits, targets)):
            loss = F.binary_cross_entropy_with_logits(stage_logits, target.float(), reduction="none")
            region = torch.ones_like(target)
            if i > 1:  # the logits of the stage before are those that inference would go on from
                previous = boundary(merged >= 0, 2) | boundary(targets[i - 1], 2)
                region = _upsample(previous.float(), stage_logits.shape[-1]) >= 0.5
                merged = refine_at_boundary(merged, stage_logits.detach())
            sums.append((loss * region).sum())
            counts.append(region.sum().float())

        iou_targets = self._iou_targets(logits[1].detach() >= 0, targets[1], samples)
        errors = (ious[torch.arange(len(labels), device=labels.device), labels] - iou_targets).square()
        sums.append((errors * (iou_targets > 0)).sum())
        counts.append((iou_targets > 0).sum().float())
        return sums, counts

    @staticmethod
    def _iou_targets(predicted: Tensor, target: Tensor, samples: list[Instances]) -> Tensor:
        """[R] IoU of masks with whole objects, which may be larger than their boxes.

        Args:
            predicted, target: [R, s, s] bool, inside the boxes.
            samples: with R boxes and objects in all.
        """
        cells = torch.cat([x.proposal_boxes.area() for x in samples]) / target[0].numel()  # pixels in a mask's cell
        whole = torch.cat([_areas(x.gt_masks).to(cells.device) for x in samples]) / cells
        predicted_area, inside, common = (x.sum(dim=(1, 2)) for x in (predicted, target, predicted & target))
        return common / (predicted_area + torch.maximum(whole, inside) - common).clamp(min=1.0)

    def inference(self, memory: FeaturePyramid, detections: list[Instances]) -> list[Instances]:
        """Add the masks of the detections.

        Args:
            memory: the encoder's output for B images.
            detections: of each image, ``pred_boxes`` (xyxy pixels of the network input), ``scores`` and
                ``pred_classes``.

        Returns:
            The detections with ``pred_masks``, [N, 1, 112, 112] probabilities inside the boxes, which detectron2's
            ``detector_postprocess`` pastes into the image, and ``mask_scores``: the score of the box times the
            predicted IoU of the mask.
        """
        maps = [x.float() for x in memory.maps()]
        for i, found in enumerate(detections):
            image_maps = [x[i : i + 1] for x in maps]
            semantic = self.semantic_maps(image_maps)
            masks, ious = [found.scores.new_zeros(0, 1, _SIZES[-1], _SIZES[-1])], [found.scores.new_zeros(0)]
            for boxes, labels in zip(found.pred_boxes.tensor.split(_CHUNK), found.pred_classes.split(_CHUNK)):
                if len(labels) == 0:
                    break
                logits, chunk_ious = self.predict(image_maps, semantic, [Boxes(boxes)], labels)
                merged = refine_at_boundary(refine_at_boundary(logits[1], logits[2]), logits[3])
                masks.append(merged.sigmoid())
                ious.append(chunk_ious.gather(1, labels[:, None]).squeeze(1))
            found.pred_masks = torch.cat(masks)
            found.mask_scores = found.scores * torch.cat(ious)
        return detections

    def semantic_maps(self, maps: list[Tensor]) -> list[Tensor]:
        """The levels, [B, C, h, w] -> the finest one as each of the three stages reads it, [B, C_s, h, w]."""
        x = maps[0]
        for conv in self.semantic_convs:
            x = conv(x)
        return [F.relu(stage.semantic_transform_in(x)).float() for stage in self.stages]

    def predict(
        self, maps: list[Tensor], semantic: list[Tensor], boxes: list[Boxes], labels: Tensor
    ) -> tuple[list[Tensor], Tensor]:
        """
        Args:
            maps: levels of the pyramid, each [B, C, h, w] float32.
            semantic: what :meth:`semantic_maps` makes of them.
            boxes: of each image, R in all; xyxy pixels of the network input.
            labels: [R] class of each box.

        Returns:
            Mask logits of each stage, [R, 1, s, s] for s = 14, 28, 56, 112, and the predicted IoU for each class,
            [R, K]. All float32.
        """
        pooled = x = self.pooler(maps, boxes)  # [R, C, 14, 14]
        for conv in self.instance_convs:
            x = conv(x)
        logits = []
        for i, (stage, layer) in enumerate(zip(self.stages, self.stage_instance_logits)):
            # The box's class alone: thousands of classes would need gigabytes.
            weight, bias = layer.weight[labels, :, 0, 0], layer.bias[labels]
            logits.append((torch.einsum("rchw,rc->rhw", x, weight) + bias[:, None, None]).float().unsqueeze(1))
            x = stage(x, self.semantic_poolers[i](semantic[i : i + 1], boxes), logits[-1].sigmoid())
            if i < len(self.stages) - 1:
                x = F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False)
        last = self.stage_instance_logits[-1](x).float()
        logits.append(F.interpolate(last, size=(_SIZES[-1],) * 2, mode="bilinear", align_corners=True))
        return logits, self.iou_head(pooled, logits[1].sigmoid())


def boundary(masks: Tensor, width: int) -> Tensor:
    """Where a mask changes: more than a tenth of the ``2 * width + 1`` squared pixels around differ from the pixel.

    Args:
        masks: [R, s, s] or [R, 1, s, s] bool. Outside of it is background.
        width: 1 counts every pixel with a neighbour (of eight) that differs.

    Returns:
        bool of the same shape.
    """
    masks = masks.float()
    average = F.avg_pool2d(masks, 2 * width + 1, stride=1, padding=width)
    return (masks - average).abs() > 0.1


def refine_at_boundary(coarse: Tensor, fine: Tensor) -> Tensor:
    """Logits of a finer mask near the boundary of the coarser one, and elsewhere the coarser one's, made larger.

    Args:
        coarse, fine: [R, s, s] and [R, 2s, 2s] logits, or [R, 1, s, s] and [R, 1, 2s, 2s].

    Returns:
        Logits like ``fine``.
    """
    size = fine.shape[-1]
    is_inner = _upsample((~boundary(coarse >= 0, 1)).float(), size) >= 0.5
    return torch.where(is_inner, _upsample(coarse, size), fine)


def _upsample(x: Tensor, size: int) -> Tensor:
    """[R, s, s] or [R, 1, s, s] -> ``size`` pixels on a side, corner pixels on corner pixels."""
    batch = x.reshape(-1, 1, *x.shape[-2:])
    batch = F.interpolate(batch, size=(size, size), mode="bilinear", align_corners=True)
    return batch.view(*x.shape[:-2], size, size)


def _areas(masks: BitMasks | PolygonMasks) -> Tensor:
    """[N] float32 area of each mask in pixels."""
    return masks.area().float() if isinstance(masks, PolygonMasks) else masks.tensor.flatten(1).sum(1).float()
