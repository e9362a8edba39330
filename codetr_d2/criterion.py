"""Losses of all groups of queries (paper, eqs. 5 and 6)."""

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from fvcore.nn import sigmoid_focal_loss
from torch import Tensor, nn
from torchvision.ops import box_convert

from .assigners.hungarian import HungarianMatcher
from .distributed import reduce_mean
from .layers import paired_giou
from .structures import DecoderOutput, EncoderProposals, FeaturePyramid

__all__ = ["SetCriterion", "Targets"]


class Targets:
    """The ground truth of a batch, padded to one size.

    Args:
        instances: for each image its ``gt_boxes`` (xyxy pixels) and ``gt_classes``.
        image_sizes_xyxy: [B, 4] (w, h, w, h) of the images in pixels.

    Attributes:
        num_targets: number of objects of each image.
        labels: [B, G] int64, padded with 0.
        boxes: [B, G, 4] cxcywh normalised, padded with 0.
        image_sizes_xyxy: as given.
    """

    def __init__(self, instances: list[Instances], image_sizes_xyxy: Tensor):
        self.num_targets = [len(x) for x in instances]
        self.image_sizes_xyxy = image_sizes_xyxy
        size = max(self.num_targets)
        labels = image_sizes_xyxy.new_zeros((len(instances), size), dtype=torch.int64)
        boxes = image_sizes_xyxy.new_zeros((len(instances), size, 4))
        for i, x in enumerate(instances):
            labels[i, : len(x)] = x.gt_classes
            boxes[i, : len(x)] = box_convert(x.gt_boxes.tensor / image_sizes_xyxy[i], "xyxy", "cxcywh")
        self.labels, self.boxes = labels, boxes


class SetCriterion(nn.Module):
    """Classification, L1 and GIoU losses of all decoder layers and all groups of queries at once.

    Groups without targets of their own are matched one to one with the ground truth, layer by layer. Losses are sums
    divided by the number of positives, averaged over processes.

    Args:
        num_classes: number of classes; also the label of background.
        matcher: the one-to-one matcher.
        weight_cls, weight_box, weight_giou: loss weights.
    """

    def __init__(
        self, num_classes: int, matcher: HungarianMatcher, weight_cls: float, weight_box: float, weight_giou: float
    ):
        super().__init__()
        self.num_classes = num_classes
        self.matcher = matcher
        self.weight_cls = weight_cls
        self.weight_box = weight_box
        self.weight_giou = weight_giou

    def forward(
        self,
        outputs: list[DecoderOutput],
        proposals: EncoderProposals,
        pyramid: FeaturePyramid,
        instances: list[Instances],
    ) -> dict[str, Tensor]:
        """
        Args:
            outputs: the decoder's predictions for each group of queries.
            proposals: the encoder's predictions.
            pyramid: for the sizes of the images.
            instances: the ground truth of each image, boxes in pixels of the network input.

        Returns:
            ``loss_cls``, ``loss_box`` and ``loss_giou`` with the name of the group and the number of the layer behind
            them (the last layer has none), and with ``_enc`` for the encoder's proposals.
        """
        targets = Targets(instances, pyramid.image_sizes_xyxy)
        matched = [output for output in outputs if output.group.labels is None]
        matched.append(self.encoder_output(proposals))
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

    def encoder_output(self, proposals: EncoderProposals) -> DecoderOutput:
        """The proposals as one more layer of predictions: every token counts, with objectness in channel 0."""
        return DecoderOutput(proposals.logits[None], proposals.box_logits.sigmoid()[None], proposals.embeddings[None])

    def target_labels(self, output: DecoderOutput, targets: Targets) -> Tensor:
        """Labels that a set of predictions is trained with; the encoder's only tell objects from background."""
        return targets.labels if output.group is not None else torch.zeros_like(targets.labels)

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

        counted = torch.ones_like(positive) if group is None or group.padding_mask is None else ~group.padding_mask
        loss_cls = (self.classification_loss(output, labels) * counted.unsqueeze(-1)).sum((1, 2, 3))

        # Boxes without a target stand in for their own target: no loss, no gradient, and nothing undefined.
        target_boxes = torch.where(positive.unsqueeze(-1), target_boxes, output.boxes.detach())
        loss_box = F.l1_loss(output.boxes, target_boxes, reduction="none").sum((1, 2, 3))
        scale = image_sizes_xyxy[:, None, :]
        giou = paired_giou(
            box_convert(output.boxes, "cxcywh", "xyxy") * scale, box_convert(target_boxes, "cxcywh", "xyxy") * scale
        )
        loss_giou = ((1 - giou) * positive).sum((1, 2))

        suffix = group.name if group is not None else "_enc"
        losses = {}
        for kind, weight, values in (
            ("loss_cls", self.weight_cls, loss_cls),
            ("loss_box", self.weight_box, loss_box),
            ("loss_giou", self.weight_giou, loss_giou),
        ):
            for layer, value in enumerate((weight * values / num_positives).unbind()):
                number = "" if layer == len(values) - 1 else f"_{layer}"
                losses[f"{kind}{suffix}{number}"] = value
        return losses

    def classification_loss(self, output: DecoderOutput, labels: Tensor) -> Tensor:
        """Focal loss of every logit against the one-hot label: [layers, B, Q, K]."""
        one_hot = F.one_hot(labels, self.num_classes + 1)[..., :-1].to(output.logits.dtype)
        return sigmoid_focal_loss(output.logits, one_hot, alpha=0.25, gamma=2.0, reduction="none")
