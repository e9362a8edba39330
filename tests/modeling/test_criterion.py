import math

import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from fvcore.nn import sigmoid_focal_loss
from torchvision.ops import box_convert, box_iou, generalized_box_iou_loss

from codetr_d2.modeling.assigners.hungarian import HungarianMatcher
from codetr_d2.modeling.criterion import SetCriterion
from codetr_d2.modeling.structures import DecoderOutput, QueryGroup, Targets

NUM_CLASSES = 4


@pytest.fixture
def criterion():
    return SetCriterion(NUM_CLASSES, HungarianMatcher(2.0, 5.0, 2.0), weight_cls=2.0, weight_box=5.0, weight_giou=2.0)


def make_output(name: str, labels=None, padding_mask=None) -> DecoderOutput:
    """Predictions of 3 layers for 2 images and 6 queries."""
    boxes = (torch.rand(3, 2, 6, 4) * 0.3 + 0.3).requires_grad_()
    target_boxes = None if labels is None else torch.rand(2, 6, 4) * 0.3 + 0.3
    group = QueryGroup(
        name, torch.zeros(2, 6, 8), boxes[0], padding_mask=padding_mask, labels=labels, target_boxes=target_boxes
    )
    logits = torch.randn(3, 2, 6, NUM_CLASSES, requires_grad=True)
    return DecoderOutput(logits, boxes, torch.zeros(3, 2, 6, 8), group=group)


def make_scene(*num_objects: int) -> tuple[Targets, list[Instances], DecoderOutput]:
    """Ground truth of two images, and predictions of the encoder for 5 tokens."""
    sizes = [(100, 80), (64, 120)]
    instances = []
    for (height, width), n in zip(sizes, num_objects):
        boxes = box_convert(torch.rand(n, 4) * 0.3 + 0.3, "cxcywh", "xyxy")
        boxes = boxes * torch.tensor([width, height, width, height])
        instances.append(Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=torch.randint(NUM_CLASSES, (n,))))
    logits = torch.randn(1, 2, 5, NUM_CLASSES, requires_grad=True)
    boxes = torch.rand(1, 2, 5, 4, requires_grad=True)
    sizes_xyxy = torch.tensor([[w, h, w, h] for h, w in sizes], dtype=torch.float32)
    return Targets(instances, sizes_xyxy), instances, DecoderOutput(logits, boxes, torch.zeros(1, 2, 5, 8))


def test_targets():
    targets, instances, _ = make_scene(3, 1)
    assert targets.num_targets == [3, 1] and targets.boxes.shape == (2, 3, 4)
    back = box_convert(targets.boxes[1, :1], "cxcywh", "xyxy") * torch.tensor([120, 64, 120, 64])
    torch.testing.assert_close(back, instances[1].gt_boxes.tensor)


def test_fixed_targets_against_libraries(criterion):
    """Losses of a group whose targets an auxiliary head has fixed, computed once more layer by layer."""
    targets, _, encoder_output = make_scene(2, 1)
    labels = torch.tensor([[1, 0, 3, 4, 4, 4], [2, 4, 4, 4, 4, 4]])
    mask = torch.tensor([[False] * 5 + [True], [False] * 3 + [True] * 3])
    output = make_output("_aux_roi", labels, mask)
    losses = criterion([make_output(""), output], encoder_output, targets)
    positive, n = labels < NUM_CLASSES, 4
    one_hot = F.one_hot(labels, NUM_CLASSES + 1)[..., :-1].float()
    for layer, suffix in enumerate(["_aux_roi_0", "_aux_roi_1", "_aux_roi"]):
        focal = sigmoid_focal_loss(output.logits[layer][~mask], one_hot[~mask], alpha=0.25, gamma=2, reduction="sum")
        torch.testing.assert_close(losses[f"loss_cls{suffix}"], 2 * focal / n)
        boxes, targets = output.boxes[layer][positive], output.group.target_boxes[positive]
        torch.testing.assert_close(losses[f"loss_box{suffix}"], 5 * (boxes - targets).abs().sum() / n)
        giou = generalized_box_iou_loss(*(box_convert(x, "cxcywh", "xyxy") for x in (boxes, targets)), reduction="sum")
        torch.testing.assert_close(losses[f"loss_giou{suffix}"], 2 * giou / n)


def test_losses_are_divided_by_the_mean_over_the_processes(criterion, other_process):
    """Another process has three times as many positives: twice as many on average."""
    targets, _, encoder_output = make_scene(3, 2)
    outputs = [make_output(""), make_output("_aux_roi", torch.tensor([[1, 0, 3, 4, 4, 4], [2, 4, 4, 4, 4, 4]]))]
    alone = criterion(outputs, encoder_output, targets)
    other_process(3)
    for name, loss in criterion(outputs, encoder_output, targets).items():
        assert loss > 0
        torch.testing.assert_close(loss, alone[name] / 2)


def test_names(criterion):
    targets, _, encoder_output = make_scene(2, 1)
    losses = criterion([make_output("")], encoder_output, targets)
    assert set(losses) == {f"loss_{k}{s}" for k in ("cls", "box", "giou") for s in ("", "_0", "_1", "_enc")}


def test_perfect_predictions(criterion):
    """A query on each object with a sure class, and no other: next to no loss, whatever the order of the queries."""
    targets, _, encoder_output = make_scene(3, 2)
    output = make_output("")
    with torch.no_grad():
        output.logits.fill_(-20)
        for image, n in enumerate(targets.num_targets):
            order = torch.randperm(6)[:n]
            output.boxes[:, image, order] = targets.boxes[image, :n]
            output.logits[:, image, order, targets.labels[image, :n]] = 20
    losses = criterion([output], encoder_output, targets)
    assert all(value < 1e-4 for name, value in losses.items() if not name.endswith("_enc"))


@pytest.mark.parametrize("num_objects", [(0, 0), (0, 3), (9, 1)])
def test_no_objects_and_more_objects_than_queries(criterion, num_objects):
    targets, _, encoder_output = make_scene(*num_objects)
    output = make_output("")
    losses = criterion([output], encoder_output, targets)
    sum(losses.values()).backward()
    assert all(torch.isfinite(x) for x in losses.values())
    for tensor in (output.logits, output.boxes, encoder_output.logits, encoder_output.boxes):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()
    if num_objects == (0, 0):
        assert not output.boxes.grad.any() and output.logits.grad.any()


def test_quality_focal_against_its_definition(criterion):
    """Of positives the class is trained towards the IoU of the predicted box, everything else towards 0."""
    criterion = SetCriterion(NUM_CLASSES, criterion.matcher, 1.0, 5.0, 2.0, quality_focal=True)
    targets, _, encoder_output = make_scene(2, 1)
    labels = torch.tensor([[1, 0, 3, 4, 4, 4], [2, 4, 4, 4, 4, 4]])
    output = make_output("_dn", labels)
    losses = criterion([make_output(""), output], encoder_output, targets)
    for layer, suffix in enumerate(["_dn_0", "_dn_1", "_dn"]):
        total = 0.0
        for image in range(2):
            boxes = box_convert(output.boxes[layer, image].detach(), "cxcywh", "xyxy")
            iou = box_iou(boxes, box_convert(output.group.target_boxes[image], "cxcywh", "xyxy")).diag()
            for query in range(6):
                for c in range(NUM_CLASSES):
                    p = output.logits[layer, image, query, c].detach().sigmoid().item()
                    q = iou[query].item() if labels[image, query] == c else 0.0
                    total -= (q * math.log(p) + (1 - q) * math.log(1 - p)) * (q - p) ** 2
        assert losses[f"loss_cls{suffix}"].item() == pytest.approx(total / 4, rel=1e-4)


def test_encoder_learns_objectness_or_classes(criterion):
    """With objectness only the logit of class 0 has a positive target."""
    for objectness in (True, False):
        criterion.encoder_objectness = objectness
        targets, _, encoder_output = make_scene(3, 2)
        targets.labels.fill_(2)
        with torch.no_grad():
            encoder_output.logits.fill_(-10)
        criterion([make_output("")], encoder_output, targets)["loss_cls_enc"].backward()
        wants_more = (encoder_output.logits.grad < -1e-3).flatten(0, 2).any(0).nonzero().flatten().tolist()
        assert wants_more == ([0] if objectness else [2])
