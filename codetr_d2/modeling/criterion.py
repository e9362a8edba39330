"""Losses of all groups of queries (paper, eqs. 5 and 6)."""

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torchvision.ops import box_convert

from ..distributed import reduce_mean
from ..layers import focal_loss, paired_giou, paired_iou, quality_focal_loss
from .assigners.hungarian import HungarianMatcher
from .structures import DecoderOutput, Targets

__all__ = ["SetCriterion"]


class SetCriterion(nn.Module):
    """Classification, L1 and GIoU losses of all decoder layers and all groups of queries at once.

    Groups without targets of their own are matched one to one with the ground truth, layer by layer. Losses are sums
    divided by the number of positives, averaged over processes.

    Args:
        num_classes: number of classes; also the label of background.
        matcher: the one-to-one matcher.
        weight_cls, weight_box, weight_giou: loss weights.
        quality_focal: the classification loss is the quality focal loss, whose targets are the IoU of the predicted
            box at the class of a positive (Co-DINO); otherwise the focal loss.
        encoder_objectness: the encoder's predictions only tell objects from background, in the logit of class 0
            (Co-Deformable-DETR); otherwise they are trained with the classes.
    """

    def __init__(
        self,
        num_classes: int,
        matcher: HungarianMatcher,
        weight_cls: float,
        weight_box: float,
        weight_giou: float,
        quality_focal: bool = False,
        encoder_objectness: bool = True,
    ):
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_cls = weight_cls
        self.weight_box = weight_box
        self.weight_giou = weight_giou
        self.quality_focal = quality_focal
        self.encoder_objectness = encoder_objectness

    def forward(
        self,
        outputs: list[DecoderOutput],
        encoder_output: DecoderOutput | None,
        targets: Targets,
    ) -> dict[str, Tensor]:
        """
        Args:
            outputs: the decoder's predictions for each group of queries.
            encoder_output: the encoder's predictions, as one more layer without a group; None where it has none.
            targets: the ground truth.

        Returns:
            ``loss_cls``, ``loss_box`` and ``loss_giou`` with the name of the group and the number of the layer behind
            them (the last layer has none), and with ``_enc`` for the encoder's proposals.
        """
        matched = [output for output in outputs if output.group.labels is None]
        if encoder_output is not None:
            matched.append(encoder_output)
        costs = []
        for output in matched:
            labels = self.target_labels(output, targets)
            costs.append(
                self.matcher.cost(output.logits, output.boxes, labels, targets.boxes, targets.image_sizes_xyxy)
            )
        matches = self.matcher.match(costs, targets.num_targets)

        losses = {}
        for output, match in zip(matched, matches):
            labels, boxes = self.assign(output, match, self.target_labels(output, targets), targets.boxes)
            losses.update(self.losses(output, labels, boxes, targets.image_sizes_xyxy))
        for output in outputs:
            if output.group.labels is not None:
                num_layers = len(output.logits)
                labels = output.group.labels.expand(num_layers, -1, -1)
                boxes = output.group.target_boxes.expand(num_layers, -1, -1, -1)
                losses.update(self.losses(output, labels, boxes, targets.image_sizes_xyxy))
        return losses

    def target_labels(self, output: DecoderOutput, targets: Targets) -> Tensor:
        """[B, G] labels that a set of predictions is trained with."""
        is_encoder = output.group is None
        return torch.zeros_like(targets.labels) if is_encoder and self.encoder_objectness else targets.labels

    def assign(
        self, output: DecoderOutput, match: Tensor, target_labels: Tensor, target_boxes: Tensor
    ) -> tuple[Tensor, Tensor]:
        """Targets of every query from the matching: labels [layers, B, Q] and boxes [layers, B, Q, 4]."""
        num_layers, batch_size, num_queries = output.logits.shape[:3]
        slot = torch.where(match < 0, num_queries, match)  # one slot more takes what is not matched
        labels = match.new_full((num_layers, batch_size, num_queries + 1), self.num_classes)
        labels.scatter_(2, slot, target_labels.expand(num_layers, -1, -1))
        boxes = target_boxes.new_zeros((num_layers, batch_size, num_queries + 1, 4))
        index = slot.unsqueeze(-1).expand(-1, -1, -1, 4)
        boxes.scatter_(2, index, target_boxes.expand(num_layers, -1, -1, -1))
        return labels[:, :, :-1], boxes[:, :, :-1]

    def losses(
        self, output: DecoderOutput, labels: Tensor, target_boxes: Tensor, image_sizes_xyxy: Tensor
    ) -> dict[str, Tensor]:
        """Losses of one group of queries.

        Args:
            output: its predictions.
            labels: [layers, B, Q] int64, ``num_classes`` for background.
            target_boxes: [layers, B, Q, 4] cxcywh normalised; of no meaning where background.
            image_sizes_xyxy: [B, 4] (w, h, w, h) in pixels.
        """
        group = output.group
        positive = labels != self.num_classes
        num_positives = reduce_mean(positive.sum((1, 2)).float()).clamp(min=1)  # [layers]

        # Boxes without a target stand in for their own target: no loss, no gradient, and nothing undefined.
        target_boxes = torch.where(positive.unsqueeze(-1), target_boxes, output.boxes.detach())
        loss_box = F.l1_loss(output.boxes, target_boxes, reduction="none").sum((1, 2, 3))
        scale = image_sizes_xyxy[:, None, :]
        boxes_xyxy = box_convert(output.boxes, "cxcywh", "xyxy")
        target_boxes_xyxy = box_convert(target_boxes, "cxcywh", "xyxy")
        giou = paired_giou(boxes_xyxy * scale, target_boxes_xyxy * scale)
        loss_giou = ((1 - giou) * positive).sum((1, 2))

        if self.quality_focal:
            quality = paired_iou(boxes_xyxy.detach(), target_boxes_xyxy)
            loss_cls = quality_focal_loss(output.logits, labels, quality)
        else:
            loss_cls = focal_loss(output.logits, labels)  # [layers, B, Q]
        if group is not None and group.padding_mask is not None:
            loss_cls = loss_cls.masked_fill(group.padding_mask, 0)
        loss_cls = loss_cls.sum((1, 2))

        suffix, group_weight = (group.name, group.loss_weight) if group is not None else ("_enc", 1.0)
        losses = {}
        for kind, weight, values in (
            ("loss_cls", self.weight_cls, loss_cls),
            ("loss_box", self.weight_box, loss_box),
            ("loss_giou", self.weight_giou, loss_giou),
        ):
            for layer, value in enumerate((group_weight * weight * values / num_positives).unbind()):
                number = "" if layer == len(values) - 1 else f"_{layer}"
                losses[f"{kind}{suffix}{number}"] = value
        return losses
