import pytest
import torch
from detectron2.structures import Boxes, Instances
from torchvision.ops import box_convert, box_iou

from codetr_d2.modeling.queries import ContrastiveDenoising
from codetr_d2.modeling.structures import Targets

NUM_CLASSES = 50
SIZE = (80, 100)


def make_targets(*num_objects: int) -> Targets:
    """Boxes of 10 pixels, well inside images of 80 x 100."""
    instances = []
    for n in num_objects:
        corner = 20 + torch.rand(n, 2) * 30
        boxes = Boxes(torch.cat((corner, corner + 10), dim=1))
        instances.append(Instances(SIZE, gt_boxes=boxes, gt_classes=torch.randint(NUM_CLASSES, (n,))))
    return Targets(instances, torch.tensor([[100.0, 80, 100, 80]] * len(num_objects)))


def make_module(num_queries=40, label_noise=0.5, box_noise=0.4) -> ContrastiveDenoising:
    return ContrastiveDenoising(8, NUM_CLASSES, num_queries, label_noise, box_noise)


@pytest.mark.parametrize(
    ("num_objects", "copies"), [((4, 1), 10), ((3, 2), 13), ((40, 0), 1), ((90, 5), 1), ((0, 2), 20)]
)
def test_number_of_copies(num_objects, copies):
    group = make_module()(make_targets(*num_objects))
    assert group.num_queries == 2 * copies * max(num_objects)
    assert group.name == "_dn" and group.sees_previous and group.position is None


def test_targets_of_the_slots():
    """The first half of a copy are the objects, the second half and empty slots are background."""
    targets = make_targets(3, 1)
    group = make_module()(targets)
    labels = group.labels.view(2, -1, 2, 3)
    for image, n in enumerate(targets.num_targets):
        assert (labels[image, :, 0, :n] == targets.labels[image, :n]).all()
        assert (labels[image, :, 0, n:] == NUM_CLASSES).all() and (labels[image, :, 1] == NUM_CLASSES).all()
    assert torch.equal(group.target_boxes.view(2, -1, 3, 4)[1, 5], targets.boxes[1])
    empty = group.reference_boxes.view(2, -1, 2, 3, 4)[1, :, :, 1:]
    assert (empty == 0.5).all() and not group.content.view(2, -1, 2, 3, 8)[1, :, :, 1:].any()


def test_positives_lie_nearer_than_negatives():
    """Positives move by less than half a side at each corner, negatives by more."""
    targets = make_targets(5, 5)
    group = make_module(num_queries=500, box_noise=1.0)(targets)
    boxes = box_convert(group.reference_boxes.view(2, -1, 2, 5, 4), "cxcywh", "xyxy")
    truth = box_convert(targets.boxes, "cxcywh", "xyxy")[:, None, None]
    moved = (boxes - truth).abs() / (targets.boxes[..., 2:] / 2).repeat(1, 1, 2)[:, None, None]
    positive, negative = moved[:, :, 0], moved[:, :, 1]
    # Corners that change places are put in order again, which only a negative's can.
    assert positive.max() <= 1.01 and positive.mean() == pytest.approx(0.5, abs=0.05)
    overlap = [box_iou(boxes[0, :, half, 0], truth[0, 0, :, 0]).mean() for half in (0, 1)]
    assert overlap[0] > 0.3 > overlap[1] + 0.1
    assert negative.mean() > positive.mean() + 0.5


@pytest.mark.parametrize("noise", [0.0, 0.6])
def test_share_of_replaced_labels(noise):
    """Half of the noise is the share of the labels that are drawn anew."""
    targets = make_targets(10, 10)
    module = make_module(num_queries=1000, label_noise=noise)
    group = module(targets)
    own = module.label_embed(targets.labels)[:, None, None]
    kept = (group.content.view(2, -1, 2, 10, 8) == own).all(-1).float().mean().item()
    assert kept == pytest.approx(1 - noise / 2 * (1 - 1 / NUM_CLASSES), abs=0.03)


def test_without_noise_the_ground_truth_comes_back():
    targets = make_targets(4, 2)
    group = make_module(label_noise=0.0, box_noise=0.0)(targets)
    boxes = group.reference_boxes.view(2, -1, 4, 4)
    torch.testing.assert_close(boxes[0, 7], targets.boxes[0], rtol=0, atol=1e-5)


@pytest.mark.parametrize("num_objects", [(0, 0), (0, 3)])
def test_images_without_objects(num_objects):
    module = make_module()
    group = module(make_targets(*num_objects))
    assert (group.labels[0] == NUM_CLASSES).all() and torch.isfinite(group.reference_boxes).all()
    group.content.sum().backward()
    assert module.label_embed.weight.grad is not None
