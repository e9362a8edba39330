"""What every auxiliary head must do; a head is tested as soon as it is registered."""

import copy
import pickle

import pytest
import torch
from detectron2.utils.events import EventStorage

from codetr_d2.modeling.auxiliary import AUX_HEAD_REGISTRY, build_auxiliary_head

HEADS = sorted(name for name, _ in AUX_HEAD_REGISTRY)
SIZES = [(96, 128), (80, 90)]  # the second image has padding
BOXES = [[[10, 10, 60, 70], [50, 20, 120, 90]], [[4, 8, 42, 52], [52, 40, 90, 80]]]  # the last touches its border
CLASSES = [[2, 0], [1, 1]]


@pytest.fixture(params=HEADS)
def name(request):
    return request.param


@pytest.fixture(autouse=True)
def storage():
    """detectron2's heads log into the current event storage."""
    with EventStorage() as storage:
        yield storage


@pytest.fixture
def head(name, cfg, input_shapes):
    return build_auxiliary_head(name, cfg, input_shapes)


@pytest.fixture
def targets(make_targets):
    return [make_targets(*x) for x in zip(SIZES, BOXES, CLASSES)]


def disturb(head):
    """Random predictors, as if they had been trained: sure of their classes, with boxes that leave the image."""
    generator = torch.Generator().manual_seed(1)
    with torch.no_grad():
        for x in head.parameters():
            x.add_(torch.randn(x.shape, generator=generator) * 0.2)
    return head


def train(head, pyramid, targets):
    """Losses and candidates, with the same random choices every time."""
    torch.manual_seed(0)
    return head.train()(pyramid, targets)


def detect(head, pyramid):
    return head.eval().inference(pyramid)


def check_losses(head, losses):
    assert losses
    for name, loss in losses.items():
        assert loss.shape == () and loss.dtype == torch.float32 and loss.isfinite(), name
    head.zero_grad()
    sum(losses.values()).backward()
    bad = [n for n, x in head.named_parameters() if x.grad is None or not x.grad.isfinite().all()]
    assert not bad


def check_candidates(samples, targets, num_classes, channels=16):
    """Shapes, types, and that each positive has the box and the class of an object of its image."""
    assert len(samples.boxes) == len(samples.labels) == len(samples.target_boxes) == len(samples.features)
    for boxes, labels, gt, features, x in zip(
        samples.boxes, samples.labels, samples.target_boxes, samples.features, targets, strict=True
    ):
        assert len(labels) > 0
        assert boxes.shape == gt.shape == (len(labels), 4)
        assert len(labels) % len(features) == 0 and features.shape[1:] == (channels,)
        assert boxes.dtype == gt.dtype == torch.float32 and labels.dtype == torch.int64
        assert not boxes.requires_grad and not gt.requires_grad
        assert all(v.isfinite().all() for v in (boxes, gt, features))
        assert ((labels >= 0) & (labels <= num_classes)).all()
        positive = labels < num_classes
        assert positive.any() == (len(x) > 0)
        same = (gt[positive][:, None] == x.gt_boxes.tensor).all(-1) & (labels[positive][:, None] == x.gt_classes)
        assert same.any(1).all()
        assert same.any(0).all()  # every object has a positive; these are neither tiny nor hidden


def check_detections(found, size, num_classes):
    assert found.image_size == size and len(found) > 0
    boxes, scores = found.pred_boxes.tensor, found.scores
    assert boxes.dtype == scores.dtype == torch.float32 and not boxes.requires_grad and not scores.requires_grad
    assert (scores.diff() <= 0).all() and (scores >= 0).all() and (scores <= 1).all()
    assert (boxes >= 0).all() and (boxes <= torch.tensor([size[1], size[0]] * 2)).all()
    assert found.pred_classes.dtype == torch.int64
    assert ((found.pred_classes >= 0) & (found.pred_classes < num_classes)).all()


def assert_same(outcome, expected):
    """Losses and detections are the same to the last bit."""
    (losses, detections), (expected_losses, expected_detections) = outcome, expected
    assert {k: v.item() for k, v in losses.items()} == {k: v.item() for k, v in expected_losses.items()}
    for x, y in zip(detections, expected_detections, strict=True):
        assert len(x) > 0 and torch.equal(x.pred_boxes.tensor, y.pred_boxes.tensor)
        assert torch.equal(x.scores, y.scores) and torch.equal(x.pred_classes, y.pred_classes)


def test_losses_and_candidates(head, make_pyramid, targets):
    pyramid = make_pyramid(SIZES)
    pyramid.tokens.requires_grad_()
    losses, samples = train(head, pyramid, targets)
    check_candidates(samples, targets, 3)
    [of_features] = torch.autograd.grad(sum(x.sum() for x in samples.features), pyramid.tokens, retain_graph=True)
    assert of_features.abs().sum() > 0
    check_losses(head, losses)
    assert all(loss > 0 for loss in losses.values())
    assert pyramid.tokens.grad.abs().sum() > 0


def test_candidates_without_losses(head, make_pyramid, targets):
    """The same ones, with the same gradient of their features, and none for the head."""
    outcomes = []
    for candidates in (lambda *x: head(*x)[1], head.candidates):
        torch.manual_seed(0)
        pyramid = make_pyramid(SIZES)
        pyramid.tokens.requires_grad_()
        samples = candidates(pyramid, targets)
        check_candidates(samples, targets, 3)
        sum((x * x.detach()).sum() for x in samples.features).backward()
        outcomes.append(
            [*samples.boxes, *samples.labels, *samples.target_boxes, *samples.features, pyramid.tokens.grad]
        )
    assert all(map(torch.equal, *outcomes))
    assert all(x.grad is None for x in head.parameters())


@pytest.mark.parametrize("empty", [(0,), (1,), (0, 1)])
def test_images_without_objects(head, make_pyramid, make_targets, targets, empty):
    names = set(train(head, make_pyramid(SIZES), targets)[0])
    for i in empty:
        targets[i] = make_targets(SIZES[i], [], [])
    losses, samples = train(head, make_pyramid(SIZES), targets)
    assert set(losses) == names
    check_losses(head, losses)
    check_candidates(samples, targets, 3)


@pytest.mark.parametrize("num_classes", [1, 7])
def test_number_of_classes(name, cfg, input_shapes, make_pyramid, targets, num_classes):
    cfg.MODEL.CODETR.NUM_CLASSES = num_classes
    head = disturb(build_auxiliary_head(name, cfg, input_shapes))
    for x in targets:
        x.gt_classes = x.gt_classes * 3 % num_classes  # up to 6
    losses, samples = train(head, make_pyramid(SIZES), targets)
    check_losses(head, losses)
    check_candidates(samples, targets, num_classes)
    detections = detect(head, make_pyramid(SIZES))
    for found, size in zip(detections, SIZES, strict=True):
        check_detections(found, size, num_classes)
    assert len(set(torch.cat([x.pred_classes for x in detections]).tolist())) > num_classes // 2


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_autocast(head, make_pyramid, targets, dtype):
    disturb(head)
    pyramid = make_pyramid(SIZES)
    pyramid.tokens = pyramid.tokens.to(dtype)
    with torch.autocast("cpu", dtype):
        losses, samples = train(head, pyramid, targets)
        detections = detect(head, pyramid)
    check_losses(head, losses)
    check_candidates(samples, targets, 3)
    for found, size in zip(detections, SIZES, strict=True):
        check_detections(found, size, 3)


def test_padding_is_never_positive(head, make_pyramid, targets):
    """Objects touch the border, so that anchors behind it would overlap them well."""
    pyramid = make_pyramid(SIZES, canvas=(160, 192))
    for scene in (targets, targets[::-1]):
        sizes = [x.image_size for x in scene]
        _, samples = train(head, make_pyramid(sizes, canvas=(160, 192)), scene)
        check_candidates(samples, scene, 3)
        for (height, width), boxes, labels in zip(sizes, samples.boxes, samples.labels):
            centres = (boxes[:, :2] + boxes[:, 2:])[labels < 3] / 2
            assert (centres >= 0).all() and (centres < torch.tensor([width, height])).all()
    for found, size in zip(detect(disturb(head), pyramid), SIZES, strict=True):
        check_detections(found, size, 3)


def test_detections(name, cfg, input_shapes, make_pyramid):
    cfg.TEST.DETECTIONS_PER_IMAGE = 1000
    head = disturb(build_auxiliary_head(name, cfg, input_shapes))
    detections = detect(head, make_pyramid(SIZES))
    for found, size in zip(detections, SIZES, strict=True):
        check_detections(found, size, 3)
        limits = torch.tensor([size[1], size[0]] * 2)
        assert ((found.pred_boxes.tensor == limits) | (found.pred_boxes.tensor == 0)).any()  # some have been clipped
    fewest = min(len(found) for found in detections)
    assert fewest > 7
    cfg.TEST.DETECTIONS_PER_IMAGE = 7
    limited = build_auxiliary_head(name, cfg, input_shapes)
    limited.load_state_dict(head.state_dict())
    for found, all_found in zip(detect(limited, make_pyramid(SIZES)), detections, strict=True):
        assert len(found) == 7
        assert torch.equal(found.scores, all_found.scores[:7])


@pytest.mark.parametrize("again", [copy.deepcopy, lambda head: pickle.loads(pickle.dumps(head))])
def test_a_used_head_is_copied_whole(head, make_pyramid, targets, again):
    disturb(head)

    def outcome(head):
        return train(head, make_pyramid(SIZES), targets)[0], detect(head, make_pyramid(SIZES))

    first = outcome(head)
    other = again(head)
    assert_same(outcome(other), first)
    for x in other.parameters():  # a copy, not the same parameters
        x.data.zero_()
    assert_same(outcome(head), first)


def test_training_after_inference_mode(head, make_pyramid, targets):
    fresh = copy.deepcopy(head)
    with torch.inference_mode():
        detect(head, make_pyramid(SIZES))
    losses, samples = train(head, make_pyramid(SIZES), targets)
    check_losses(head, losses)
    check_candidates(samples, targets, 3)
    expected, _ = train(fresh, make_pyramid(SIZES), targets)
    assert {k: v.item() for k, v in losses.items()} == {k: v.item() for k, v in expected.items()}


def test_losses_are_divided_by_the_mean_over_the_processes(head, make_pyramid, targets, other_process):
    pyramid = make_pyramid(SIZES)
    if hasattr(head, "cls_score"):  # so that sums of scores, which are small at first, are above their floor
        head.cls_score.bias.data.zero_()
    alone, _ = train(head, pyramid, targets)
    other_process(1)  # the other process has the same images: so do the losses stay the same
    for loss_name, loss in train(head, pyramid, targets)[0].items():
        torch.testing.assert_close(loss, alone[loss_name])
    other_process(3)  # three times as many positives: twice as many on average
    torch.testing.assert_close(train(head, pyramid, targets)[0]["loss_cls"], alone["loss_cls"] / 2)
