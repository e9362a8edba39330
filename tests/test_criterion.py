import pytest
import torch
import torch.nn.functional as F
from detectron2.structures import Boxes, Instances
from fvcore.nn import sigmoid_focal_loss
from torchvision.ops import box_convert, generalized_box_iou_loss

from codetr_d2.assigners.hungarian import HungarianMatcher
from codetr_d2.criterion import SetCriterion, Targets
from codetr_d2.structures import DecoderOutput, EncoderProposals, FeaturePyramid, QueryGroup

NUM_CLASSES = 4


@pytest.fixture
def criterion():
    return SetCriterion(NUM_CLASSES, HungarianMatcher(2.0, 5.0, 2.0), weight_cls=2.0, weight_box=5.0, weight_giou=2.0)


def make_output(name: str, labels=None, padding_mask=None) -> DecoderOutput:
    """Predictions of 3 layers for 2 images and 6 queries."""
    boxes = (torch.rand(3, 2, 6, 4) * 0.3 + 0.3).requires_grad_()
    target_boxes = None if labels is None else torch.rand(2, 6, 4) * 0.3 + 0.3
    group = QueryGroup(name, torch.zeros(2, 6, 8), boxes[0], None, padding_mask, labels, target_boxes)
    return DecoderOutput(torch.randn(3, 2, 6, NUM_CLASSES, requires_grad=True), boxes, torch.zeros(3, 2, 6, 8), group)


def make_scene(*num_objects: int) -> tuple[FeaturePyramid, list[Instances], EncoderProposals]:
    sizes = [(100, 80), (64, 120)]
    pyramid = FeaturePyramid(torch.zeros(2, 5, 8), torch.zeros(2, 5, dtype=torch.bool), [], [], sizes, torch.ones(2, 0))
    instances = []
    for (height, width), n in zip(sizes, num_objects):
        boxes = box_convert(torch.rand(n, 4) * 0.3 + 0.3, "cxcywh", "xyxy")
        boxes = boxes * torch.tensor([width, height, width, height])
        instances.append(Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=torch.randint(NUM_CLASSES, (n,))))
    logits = torch.randn(2, 5, NUM_CLASSES, requires_grad=True)
    box_logits = torch.randn(2, 5, 4, requires_grad=True)
    return pyramid, instances, EncoderProposals(logits, box_logits, box_logits, torch.zeros(2, 5, 8))


def test_targets():
    pyramid, instances, _ = make_scene(3, 1)
    targets = Targets(instances, pyramid.image_sizes_xyxy)
    assert targets.num_targets == [3, 1] and targets.boxes.shape == (2, 3, 4)
    back = box_convert(targets.boxes[1, :1], "cxcywh", "xyxy") * torch.tensor([120, 64, 120, 64])
    torch.testing.assert_close(back, instances[1].gt_boxes.tensor)


def test_fixed_targets_against_libraries(criterion):
    """Losses of a group whose targets an auxiliary head has fixed, computed once more layer by layer."""
    pyramid, instances, proposals = make_scene(2, 1)
    labels = torch.tensor([[1, 0, 3, 4, 4, 4], [2, 4, 4, 4, 4, 4]])
    mask = torch.tensor([[False] * 5 + [True], [False] * 3 + [True] * 3])
    output = make_output("_aux_roi", labels, mask)
    losses = criterion([make_output(""), output], proposals, pyramid, instances)
    positive, n = labels < NUM_CLASSES, 4
    one_hot = F.one_hot(labels, NUM_CLASSES + 1)[..., :-1].float()
    for layer, suffix in enumerate(["_aux_roi_0", "_aux_roi_1", "_aux_roi"]):
        focal = sigmoid_focal_loss(output.logits[layer][~mask], one_hot[~mask], alpha=0.25, gamma=2, reduction="sum")
        torch.testing.assert_close(losses[f"loss_cls{suffix}"], 2 * focal / n)
        boxes, targets = output.boxes[layer][positive], output.group.target_boxes[positive]
        torch.testing.assert_close(losses[f"loss_box{suffix}"], 5 * (boxes - targets).abs().sum() / n)
        giou = generalized_box_iou_loss(*(box_convert(x, "cxcywh", "xyxy") for x in (boxes, targets)), reduction="sum")
        torch.testing.assert_close(losses[f"loss_giou{suffix}"], 2 * giou / n)


def test_names(criterion):
    pyramid, instances, proposals = make_scene(2, 1)
    losses = criterion([make_output("")], proposals, pyramid, instances)
    assert set(losses) == {f"loss_{k}{s}" for k in ("cls", "box", "giou") for s in ("", "_0", "_1", "_enc")}


def test_perfect_predictions(criterion):
    """A query on each object with a sure class, and no other: next to no loss, whatever the order of the queries."""
    pyramid, instances, proposals = make_scene(3, 2)
    targets = Targets(instances, pyramid.image_sizes_xyxy)
    output = make_output("")
    with torch.no_grad():
        output.logits.fill_(-20)
        for image, n in enumerate(targets.num_targets):
            order = torch.randperm(6)[:n]
            output.boxes[:, image, order] = targets.boxes[image, :n]
            output.logits[:, image, order, targets.labels[image, :n]] = 20
    losses = criterion([output], proposals, pyramid, instances)
    assert all(value < 1e-4 for name, value in losses.items() if not name.endswith("_enc"))


@pytest.mark.parametrize("num_objects", [(0, 0), (0, 3), (9, 1)])
def test_no_objects_and_more_objects_than_queries(criterion, num_objects):
    pyramid, instances, proposals = make_scene(*num_objects)
    output = make_output("")
    losses = criterion([output], proposals, pyramid, instances)
    sum(losses.values()).backward()
    assert all(torch.isfinite(x) for x in losses.values())
    for tensor in (output.logits, output.boxes, proposals.logits, proposals.box_logits):
        assert tensor.grad is not None and torch.isfinite(tensor.grad).all()
    if num_objects == (0, 0):
        assert not output.boxes.grad.any() and output.logits.grad.any()
