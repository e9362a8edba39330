import dataclasses
import json
import math
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.layers import ShapeSpec
from detectron2.modeling import build_anchor_generator, build_proposal_generator, build_roi_heads
from detectron2.modeling.poolers import ROIPooler
from detectron2.structures import Boxes, ImageList, Instances, PolygonMasks
from detectron2.utils.events import EventStorage
from torch.nn import functional as F
from torchvision.ops import box_iou, generalized_box_iou_loss

from codetr_d2.errors import InputError
from codetr_d2.modeling.auxiliary import CoROIHeads, CoRPN, ROIHead, build_auxiliary_head
from codetr_d2.modeling.auxiliary import roi as roi_module
from codetr_d2.modeling.pyramid import FeaturePyramid
from codetr_d2.ops import roi_align

DATA = Path(__file__).parents[2] / "reference" / "data"
NAMES = ["p3", "p4", "p5", "p6", "p7"]
LOSSES = {"loss_rpn_cls", "loss_rpn_box", "loss_cls", "loss_box"}


@pytest.fixture(scope="module")
def reference():
    return json.loads((DATA / "losses" / "co_deformable_detr_r50.json").read_text())


@pytest.fixture
def storage():
    """detectron2's heads log into the current event storage."""
    with EventStorage() as storage:
        yield storage


@pytest.fixture
def shapes(input_shapes):
    return dict(zip(NAMES, input_shapes))


@pytest.fixture
def d2_cfg(cfg):
    """A config for detectron2's own functions; by itself, the auxiliary head fills these in."""
    cfg.MODEL.RPN.IN_FEATURES = NAMES
    cfg.MODEL.ROI_HEADS.IN_FEATURES = NAMES[:-1]
    cfg.MODEL.ROI_HEADS.NUM_CLASSES = 3
    return cfg


def reference_anchors_and_targets(rpn, reference, make_targets):
    canvas = reference["meta"]["canvas_hw"]
    maps = [torch.zeros(1, 1, math.ceil(canvas[0] / s), math.ceil(canvas[1] / s)) for s in (8, 16, 32, 64, 128)]
    targets = [
        make_targets(tuple(size), gt["boxes_xyxy_pixels"], gt["labels"])
        for size, gt in zip(reference["meta"]["image_sizes_hw"], reference["meta"]["gt"])
    ]
    return rpn.anchor_generator(maps), targets


def valid_anchor_index(image_size, canvas):
    """For every anchor of the canvas its index among the valid ones of the image, or -1."""
    valid = []
    for stride in (8, 16, 32, 64, 128):
        h, w = (math.ceil(x / stride) for x in canvas)
        ys, xs = torch.meshgrid(torch.arange(h), torch.arange(w), indexing="ij")
        inside = (ys < math.ceil(image_size[0] / stride)) & (xs < math.ceil(image_size[1] / stride))
        valid.append(inside.flatten().repeat_interleave(9))
    valid = torch.cat(valid)
    return torch.where(valid, valid.cumsum(0) - 1, -1)


def test_anchors(cfg, input_shapes):
    """One cell's anchors: centred at its top left corner, ratios (h / w) outer and octave scales inner."""
    [boxes, *_] = build_anchor_generator(cfg, input_shapes)([torch.zeros(1, 1, 2, 3)] * 5)
    boxes = boxes.tensor.view(2, 3, 9, 4)
    expected = []
    for ratio in (0.5, 1.0, 2.0):
        for octave in range(3):
            side = 4 * 8 * 2 ** (octave / 3)
            w, h = side / math.sqrt(ratio), side * math.sqrt(ratio)
            expected.append([-w / 2, -h / 2, w / 2, h / 2])
    expected = torch.tensor(expected)
    torch.testing.assert_close(boxes[0, 0], expected)
    torch.testing.assert_close(boxes[1, 2], expected + torch.tensor([16.0, 8, 16, 8]))


def test_rpn_assignment_equals_the_published(d2_cfg, shapes, reference, make_targets):
    d2_cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 1_000_000
    rpn = build_proposal_generator(d2_cfg, shapes)
    anchors, targets = reference_anchors_and_targets(rpn, reference, make_targets)
    labels, boxes = rpn.label_and_sample_anchors(anchors, targets)
    expected = reference["intermediate"]
    for i, target in enumerate(targets):
        positive = (labels[i] == 1).nonzero().squeeze(1)
        index = valid_anchor_index(target.image_size, reference["meta"]["canvas_hw"])
        gt_index = (boxes[i][positive][:, None] == target.gt_boxes.tensor).all(-1).int().argmax(1)
        assert torch.stack([index[positive], gt_index], dim=1).tolist() == expected["rpn_assigned"][i]
        assert (labels[i] == 0).sum() == expected["rpn_negative_anchors_per_image"][i]
        assert (labels[i][index == -1] == -1).all()


def test_rpn_losses_equal_the_published(d2_cfg, shapes, reference, make_targets, storage):
    """Levels 1 to 4, of which all raw outputs were recorded; the finest one is given perfect predictions."""
    d2_cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 1_000_000
    rpn = build_proposal_generator(d2_cfg, shapes)
    anchors, targets = reference_anchors_and_targets(rpn, reference, make_targets)
    labels, boxes = rpn.label_and_sample_anchors(anchors, targets)
    outputs = np.load(DATA / "forward" / "co_deformable_detr_r50.npz")
    n = len(anchors[0])
    logits = [torch.stack([(x[:n] == 1) * 2e4 - 1e4 for x in labels])]
    deltas = torch.stack([rpn.box2box_transform.get_deltas(anchors[0].tensor, x[:n]) for x in boxes])
    deltas = [deltas.nan_to_num(0, 0, 0)]
    for level in range(1, 5):
        logits.append(torch.from_numpy(outputs[f"rpn_cls_{level}"]).permute(0, 2, 3, 1).flatten(1))
        x = torch.from_numpy(outputs[f"rpn_reg_{level}"])
        deltas.append(x.permute(0, 2, 3, 1).reshape(2, -1, 4))
    losses = rpn.losses(anchors, logits, labels, deltas, boxes)
    # 12 = lambda_2 * number of decoder layers is the caller's.
    for name, recorded in (("loss_rpn_cls", "loss_rpn_cls"), ("loss_rpn_loc", "loss_rpn_bbox")):
        assert 12 * losses[name].item() == pytest.approx(sum(reference["losses"][recorded][1:]), rel=1e-5)


def test_roi_assignment_equals_the_published(d2_cfg, shapes, reference, make_targets, storage, monkeypatch):
    """Recorded positive proposals get the recorded objects back, the objects' own boxes come first."""
    monkeypatch.setattr(torch, "randperm", lambda n, **kwargs: torch.arange(n, **kwargs))
    d2_cfg.MODEL.ROI_HEADS.NUM_CLASSES = 80
    d2_cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 1_000_000
    roi_heads = build_roi_heads(d2_cfg, shapes)
    proposals, targets = [], []
    for size, gt, boxes in zip(
        reference["meta"]["image_sizes_hw"], reference["meta"]["gt"], reference["intermediate"]["roi_positive_boxes"]
    ):
        targets.append(make_targets(tuple(size), gt["boxes_xyxy_pixels"], gt["labels"]))
        x = Instances(tuple(size))
        x.proposal_boxes = Boxes(torch.tensor(boxes[len(gt["labels"]) :]))
        x.objectness_logits = torch.zeros(len(x.proposal_boxes))
        proposals.append(x)
    sampled = roi_heads.label_and_sample_proposals(proposals, targets)
    for i, x in enumerate(sampled):
        expected = torch.tensor(reference["intermediate"]["roi_positive_gt_index"][i])
        assert len(x) == reference["intermediate"]["roi_positive_per_image"][i]
        boxes = torch.tensor(reference["intermediate"]["roi_positive_boxes"][i])
        torch.testing.assert_close(x.proposal_boxes.tensor, boxes, rtol=0, atol=0)
        assert torch.equal(x.gt_boxes.tensor, targets[i].gt_boxes.tensor[expected])
        assert torch.equal(x.gt_classes, targets[i].gt_classes[expected])


def test_rpn_equals_detectron2_where_the_rules_coincide(d2_cfg, shapes, make_pyramid, make_targets, storage):
    pyramid = make_pyramid([(96, 128)])
    images, features = ImageList(pyramid.tokens, pyramid.geometry.image_sizes), dict(zip(NAMES, pyramid.maps()))
    ours = build_proposal_generator(d2_cfg, shapes)
    d2_cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    theirs = build_proposal_generator(d2_cfg, shapes)
    assert isinstance(ours, CoRPN) and not isinstance(theirs, CoRPN)
    with torch.no_grad():
        for weight in ours.rpn_head.parameters():
            weight.mul_(20)
    theirs.load_state_dict(ours.state_dict())

    # An object close to an anchor: its best anchors are positive by the threshold already.
    targets = [make_targets((96, 128), [[33, 33, 63, 64], [64.5, 48.5, 96.2, 80.1]], [0, 1])]
    results = []
    for rpn in (ours, theirs):
        torch.manual_seed(0)
        results.append(rpn(images, features, targets))
    (our_proposals, our_losses), (their_proposals, their_losses) = results
    assert torch.equal(our_proposals[0].proposal_boxes.tensor, their_proposals[0].proposal_boxes.tensor)
    # There are more negatives than the sample holds, so both divide by its size.
    for name, loss in their_losses.items():
        torch.testing.assert_close(our_losses[name], loss)

    d2_cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 1_000_000
    d2_cfg.MODEL.PROPOSAL_GENERATOR.NAME = "CoRPN"
    all_anchors = build_proposal_generator(d2_cfg, shapes)
    all_anchors.load_state_dict(ours.state_dict())
    theirs.batch_size_per_image = 1_000_000
    labels, _ = theirs.label_and_sample_anchors(theirs.anchor_generator(pyramid.maps()), targets)
    _, our_losses = all_anchors(images, features, targets)
    _, their_losses = theirs(images, features, targets)
    for name, loss in their_losses.items():
        torch.testing.assert_close(our_losses[name], loss * 1_000_000 / (labels[0] >= 0).sum())


def test_padding_changes_no_assignment(d2_cfg, shapes, make_pyramid, make_targets):
    d2_cfg.MODEL.RPN.BATCH_SIZE_PER_IMAGE = 1_000_000
    rpn = build_proposal_generator(d2_cfg, shapes)
    # The object touches the border, so that anchors in the padding would overlap it best.
    target = make_targets((90, 100), [[60, 40, 100, 90], [5, 5, 30, 60]], [0, 1])
    plain = rpn.anchor_generator(make_pyramid([(90, 100)]).maps())
    padded = rpn.anchor_generator(make_pyramid([(90, 100)], canvas=(256, 300)).maps())
    outcomes = []
    for anchors in (plain, padded):
        [labels], [boxes] = rpn.label_and_sample_anchors(anchors, [target])
        rows = torch.cat([Boxes.cat(anchors).tensor, labels[:, None], boxes * (labels == 1)[:, None]], dim=1)
        outcomes.append(rows[labels >= 0])
    assert (outcomes[0][:, 4] == 1).any()
    assert torch.equal(*outcomes)


def test_detections_equal_detectron2(d2_cfg, shapes, make_pyramid):
    pyramid = make_pyramid([(96, 128), (80, 90)])
    images, features = ImageList(pyramid.tokens, pyramid.geometry.image_sizes), dict(zip(NAMES, pyramid.maps()))
    ours = build_roi_heads(d2_cfg, shapes).eval()
    d2_cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    theirs = build_roi_heads(d2_cfg, shapes).eval()
    assert isinstance(ours, CoROIHeads) and not isinstance(theirs, CoROIHeads)
    theirs.load_state_dict(ours.state_dict())
    theirs.box_pooler = ours.box_pooler  # the last bits of its results may differ
    proposals, _ = build_proposal_generator(d2_cfg, shapes).eval()(images, features)
    with torch.no_grad():
        for x, y in zip(ours(images, features, proposals)[0], theirs(images, features, proposals)[0]):
            assert len(x) == 100
            assert torch.equal(x.pred_boxes.tensor, y.pred_boxes.tensor)
            assert torch.equal(x.scores, y.scores) and torch.equal(x.pred_classes, y.pred_classes)


@pytest.mark.parametrize("class_agnostic", [False, True])
def test_soft_nms_at_a_threshold_that_nothing_reaches(d2_cfg, shapes, make_pyramid, class_agnostic):
    """Neither kind of NMS changes anything then: the detections are those of detectron2."""
    d2_cfg.MODEL.ROI_HEADS.NMS_THRESH_TEST = 1.1
    d2_cfg.MODEL.ROI_HEADS.SCORE_THRESH_TEST = 0.01
    d2_cfg.MODEL.ROI_BOX_HEAD.CLS_AGNOSTIC_BBOX_REG = class_agnostic
    heads = build_roi_heads(d2_cfg, shapes).eval()
    pyramid = make_pyramid([(64, 96)])
    features = dict(zip(NAMES, pyramid.maps()))
    corner = torch.rand(30, 2) * 100 - 20  # many reach over the border
    proposals = [Instances((64, 96), proposal_boxes=Boxes(torch.cat((corner, corner + 20), dim=1)))]
    images = ImageList(torch.zeros(1, 3, 64, 96), [(64, 96)])
    with torch.no_grad():
        [hard] = heads(images, features, proposals)[0]
        heads.soft_nms = True
        [soft] = heads(images, features, proposals)[0]
        heads.box_predictor.test_nms_thresh = 0.3
        [lowered] = heads(images, features, proposals)[0]
    assert len(hard) > 30
    assert hard.pred_boxes.tensor.amin() == 0 and hard.pred_boxes.tensor[:, 3].amax() == 64  # clipped
    torch.testing.assert_close(soft.scores, hard.scores)
    torch.testing.assert_close(soft.pred_boxes.tensor, hard.pred_boxes.tensor)
    assert torch.equal(soft.pred_classes, hard.pred_classes)
    assert lowered.scores[0] == hard.scores[0] and lowered.scores[-1] < hard.scores[-1]


@pytest.mark.parametrize("training", [True, False])
def test_proposals_have_a_threshold_of_their_own_at_inference(
    d2_cfg, shapes, make_pyramid, make_targets, storage, training
):
    pyramid = make_pyramid([(96, 128)])
    images, features = ImageList(pyramid.tokens, pyramid.geometry.image_sizes), dict(zip(NAMES, pyramid.maps()))
    targets = [make_targets((96, 128), [[33, 33, 63, 64]], [0])]
    d2_cfg.MODEL.RPN.NMS_THRESH, d2_cfg.MODEL.RPN.NMS_THRESH_TEST = 0.5, 0.9
    ours = build_proposal_generator(d2_cfg, shapes).train(training)
    d2_cfg.MODEL.PROPOSAL_GENERATOR.NAME = "RPN"
    found = {}
    for threshold in (0.5, 0.9):
        d2_cfg.MODEL.RPN.NMS_THRESH = threshold
        theirs = build_proposal_generator(d2_cfg, shapes).train(training)
        theirs.load_state_dict(ours.state_dict())
        [found[threshold]], _ = theirs(images, features, targets)
    [proposals], _ = ours(images, features, targets)
    assert len(found[0.5]) < len(found[0.9])
    assert torch.equal(proposals.proposal_boxes.tensor, found[0.5 if training else 0.9].proposal_boxes.tensor)


def test_roi_losses_and_features(cfg, input_shapes, make_pyramid, make_targets, storage):
    """Losses and pooled features computed again from what the head hands on."""
    torch.manual_seed(0)
    sizes = [(96, 128), (80, 90)]
    pyramid = make_pyramid(sizes)
    pyramid.tokens.requires_grad_()
    targets = [
        make_targets(sizes[0], [[10, 10, 60, 70], [50, 20, 120, 90]], [2, 0]),
        make_targets(sizes[1], [[5, 5, 50, 60]], [1]),
    ]
    head = build_auxiliary_head("roi", cfg, input_shapes)
    assert isinstance(head, ROIHead)
    losses, samples = head(pyramid, targets)
    assert set(losses) == LOSSES

    heads = head.roi_heads
    logits, deltas, giou, labels = [], [], [], torch.cat(samples.labels)
    for i, boxes in enumerate(samples.boxes):
        assert not boxes.requires_grad
        num_positive = (samples.labels[i] < 3).sum()
        assert num_positive >= len(targets[i]) and (samples.labels[i][num_positive:] == 3).all()
        # The rule of the levels, with 112 = 14 * 8 pixels of the finest one.
        sides = (boxes[:, 2:] - boxes[:, :2]).prod(1).sqrt()
        levels = (sides / 112).log2().floor().clamp(0, 3)
        pooled = torch.zeros(len(boxes), 16, 7, 7)
        for level, pooler in enumerate(heads.box_pooler.level_poolers):
            chosen = levels == level
            rois = torch.cat([torch.full((int(chosen.sum()), 1), float(i)), boxes[chosen]], dim=1)
            pooled[chosen] = pooler(pyramid.maps()[level], rois)
        torch.testing.assert_close(samples.features[i], pooled.mean((2, 3)))
        x = F.relu(heads.box_head.fc1(pooled.flatten(1)))
        x = F.relu(heads.box_head.fc2(x))
        logits.append(heads.box_predictor.cls_score(x))
        x = heads.box_predictor.bbox_pred(x)
        rows = torch.arange(num_positive)
        deltas = x.view(-1, 3, 4)[rows, samples.labels[i][:num_positive]]
        decoded = heads.box_predictor.box2box_transform.apply_deltas(deltas, boxes[:num_positive])
        giou.append(generalized_box_iou_loss(decoded, samples.target_boxes[i][:num_positive], reduction="sum"))
        assert (box_iou(boxes, targets[i].gt_boxes.tensor).amax(1) >= 0.5).tolist() == [
            j < num_positive for j in range(len(boxes))
        ]
    torch.testing.assert_close(losses["loss_cls"], F.cross_entropy(torch.cat(logits), labels))
    torch.testing.assert_close(losses["loss_box"], 10 * sum(giou) / len(labels))

    # Positive queries train the encoder through their features.
    [gradient] = torch.autograd.grad(sum(x.sum() for x in samples.features), pyramid.tokens)
    assert gradient.abs().sum() > 0


@pytest.mark.parametrize("empty", [(0,), (0, 1)])
def test_images_without_objects(cfg, input_shapes, make_pyramid, make_targets, storage, empty):
    sizes = [(96, 128), (80, 90)]
    targets = [make_targets(size, [[10, 10, 60, 70]], [2]) for size in sizes]
    for i in empty:
        targets[i] = make_targets(sizes[i], [], [])
    head = build_auxiliary_head("roi", cfg, input_shapes)
    losses, samples = head(make_pyramid(sizes), targets)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    sum(losses.values()).backward()
    assert [name for name, x in head.named_parameters() if x.grad is None] == []
    for i in empty:
        assert (samples.labels[i] == 3).all() and len(samples.labels[i]) >= 9
        assert samples.boxes[i].shape == samples.target_boxes[i].shape


def test_autocast(cfg, input_shapes, make_pyramid, make_targets, storage):
    sizes = [(96, 128)]
    head = build_auxiliary_head("roi", cfg, input_shapes)
    pyramid = make_pyramid(sizes)
    pyramid.tokens = pyramid.tokens.bfloat16()
    with torch.autocast("cpu", torch.bfloat16):
        losses, samples = head(pyramid, [make_targets(sizes[0], [[10, 10, 60, 70]], [2])])
        [detections] = head.eval().inference(pyramid)
    assert all(loss.isfinite() and loss.dtype == torch.float32 for loss in losses.values())
    assert samples.boxes[0].dtype == torch.float32 and samples.features[0].dtype == torch.float32
    assert detections.scores.dtype == torch.float32


@pytest.mark.slow
def test_learns_a_few_objects(cfg, input_shapes, make_pyramid, make_targets, storage):
    """Overfitted to a random pyramid, the head detects its objects."""
    torch.manual_seed(0)
    cfg.MODEL.RPN.POST_NMS_TOPK_TRAIN = 100
    cfg.MODEL.ROI_HEADS.BATCH_SIZE_PER_IMAGE = 64
    sizes = [(96, 128), (80, 90)]
    pyramid = make_pyramid(sizes)
    targets = [
        make_targets(sizes[0], [[10, 10, 60, 70], [70, 20, 120, 90]], [2, 0]),
        make_targets(sizes[1], [[5, 5, 50, 60]], [1]),
    ]
    head = build_auxiliary_head("roi", cfg, input_shapes)
    optimizer = torch.optim.Adam(head.parameters(), lr=3e-3)
    totals = []
    for _ in range(160):
        loss = sum(head(pyramid, targets)[0].values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert totals[-1] < 0.5 * totals[0]

    head.eval()
    for size, target, detections in zip(sizes, targets, head.inference(pyramid)):
        assert detections.image_size == size and len(detections) <= 100
        assert (detections.scores.diff() <= 0).all()
        boxes, classes = detections.pred_boxes.tensor, detections.pred_classes
        assert (boxes >= 0).all() and (boxes <= torch.tensor([size[1], size[0]] * 2)).all()
        for c in range(3):
            overlaps = box_iou(boxes[classes == c], boxes[classes == c]).fill_diagonal_(0)
            assert overlaps.numel() == 0 or overlaps.max() <= 0.5 + 1e-4
        # Every object is found with its class, and surely.
        hits = (box_iou(target.gt_boxes.tensor, boxes) > 0.6) & (classes == target.gt_classes[:, None])
        assert (hits & (detections.scores > 0.5)).any(1).all()


def test_wrong_options_are_named(cfg, input_shapes):
    with pytest.raises(InputError, match="ANCHOR_GENERATOR.SIZES lists 5 levels.* 4"):
        build_auxiliary_head("roi", cfg, input_shapes[:4])
    cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES = True
    with pytest.raises(InputError, match="TRAIN_ON_PRED_BOXES"):
        build_auxiliary_head("roi", cfg, input_shapes)
    cfg.MODEL.ROI_BOX_HEAD.TRAIN_ON_PRED_BOXES = False
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIPool"
    with pytest.raises(InputError, match="MODEL.ROI_BOX_HEAD.POOLER_TYPE is 'ROIPool'.*ROIAlignV2"):
        build_auxiliary_head("roi", cfg, input_shapes)
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = "ROIAlignV2"
    cfg.MODEL.ROI_HEADS.NAME = "StandardROIHeads"
    with pytest.raises(InputError, match="ROI_HEADS.NAME"):
        build_auxiliary_head("roi", cfg, input_shapes)


def add_rectangles(targets):
    """Give each object its box as its mask."""
    boxes = targets.gt_boxes.tensor.tolist()
    targets.gt_masks = PolygonMasks([[[x0, y0, x1, y0, x1, y1, x0, y1]] for x0, y0, x1, y1 in boxes])
    return targets


@pytest.mark.parametrize("pooler_type", ["ROIAlign", "ROIAlignV2"])
def test_roi_align_reads_the_maps_as_they_lie(
    cfg, input_shapes, make_pyramid, make_targets, storage, monkeypatch, pooler_type
):
    """Box and mask heads call our operator, with views of the tokens, and pool what detectron2's poolers do."""
    layouts = set()

    def recorded(maps, *args):
        layouts.add((args[1], maps.stride(1)))
        return roi_align(maps, *args)

    monkeypatch.setattr(roi_module, "roi_align", recorded)
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_BOX_HEAD.POOLER_TYPE = cfg.MODEL.ROI_MASK_HEAD.POOLER_TYPE = pooler_type
    head = build_auxiliary_head("roi", cfg, input_shapes)
    pyramid = make_pyramid([(96, 128)])
    head(pyramid, [add_rectangles(make_targets((96, 128), [[10, 10, 60, 70]], [2]))])
    poolers = {pooler.output_size: pooler for pooler in (head.roi_heads.box_pooler, head.roi_heads.mask_pooler)}
    assert layouts == {(size, 1) for size in poolers}
    boxes = [Boxes(torch.tensor([[10.0, 10, 60, 70], [0, 0, 128, 96]]))]
    for size, pooler in poolers.items():
        scales = [x.spatial_scale for x in pooler.level_poolers]
        plain = ROIPooler(size, scales, 0, pooler_type)
        maps = pyramid.maps()[:-1]
        torch.testing.assert_close(pooler(maps, boxes), plain(maps, boxes))


def test_masks_of_the_published_size(cfg, input_shapes):
    """Mask R-CNN's branch of the published model: four convolutions, a deconvolution, one mask for each class."""
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_MASK_HEAD.NUM_CONV = 4
    cfg.MODEL.CODETR.NUM_CLASSES = 80
    shapes = [ShapeSpec(channels=256, stride=x.stride) for x in input_shapes]
    head = build_auxiliary_head("roi", cfg, shapes).roi_heads
    sizes = [tuple(x.shape) for x in head.mask_head.parameters() if x.dim() == 4]
    assert sizes == [(256, 256, 3, 3)] * 4 + [(256, 256, 2, 2), (80, 256, 1, 1)]
    assert head.mask_pooler.output_size == (14, 14) and len(head.mask_pooler.level_poolers) == 4
    cfg.MODEL.CODETR.MASK_HEAD = "refine"
    assert not build_auxiliary_head("roi", cfg, shapes).roi_heads.mask_on


def test_mask_loss(cfg, input_shapes, make_pyramid, make_targets, storage):
    """The mean over the pixels of all positive ROIs, computed again from what the head hands on."""
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    sizes = [(96, 128), (80, 90)]
    pyramid = make_pyramid(sizes)
    targets = [
        add_rectangles(make_targets(sizes[0], [[10, 10, 60, 70], [50, 20, 120, 90]], [2, 0])),
        make_targets(sizes[1], [], []),
    ]
    head = build_auxiliary_head("roi", cfg, input_shapes)
    losses, samples = head(pyramid, targets)
    assert set(losses) == LOSSES | {"loss_mask"}
    is_positive = samples.labels[0] < 3
    boxes, labels = samples.boxes[0][is_positive], samples.labels[0][is_positive]
    assert len(boxes) >= 2 and (samples.labels[1] == 3).all()
    heads = head.roi_heads
    pooled = heads.mask_pooler(pyramid.maps()[:4], [Boxes(boxes), Boxes(boxes[:0])])
    logits = heads.mask_head.layers(pooled)[torch.arange(len(boxes)), labels]
    truth = []
    for box, target in zip(boxes, samples.target_boxes[0][is_positive]):  # cells whose centre the object covers
        centres = box[:2, None] + (torch.arange(28) + 0.5) / 28 * (box[2:] - box[:2])[:, None]
        inside = (centres > target[:2, None]) & (centres < target[2:, None])
        truth.append(inside[1][:, None] & inside[0])
    expected = F.binary_cross_entropy_with_logits(logits, torch.stack(truth).float())
    torch.testing.assert_close(losses["loss_mask"], expected, rtol=1e-3, atol=0)


def test_every_loss_is_divided_by_a_mean_over_the_processes(
    cfg, input_shapes, make_pyramid, make_targets, storage, other_process
):
    """Another process has sampled three times as many anchors and ROIs: twice as many on average."""
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    head = build_auxiliary_head("roi", cfg, input_shapes)
    targets = [add_rectangles(make_targets((96, 128), [[10, 10, 60, 70], [50, 20, 120, 90]], [2, 0]))]

    def losses():
        torch.manual_seed(0)
        return head(make_pyramid([(96, 128)]), targets)[0]

    alone = losses()
    assert set(alone) == LOSSES | {"loss_mask"}
    other_process(3)
    for name, loss in losses().items():
        assert loss > 0
        torch.testing.assert_close(loss, alone[name] / 2)


@pytest.mark.parametrize("empty", [(0,), (0, 1)])
def test_masks_of_images_without_objects(cfg, input_shapes, make_pyramid, make_targets, storage, empty):
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    sizes = [(96, 128), (80, 90)]
    targets = [add_rectangles(make_targets(size, [[10, 10, 60, 70]], [2])) for size in sizes]
    for i in empty:
        targets[i] = make_targets(sizes[i], [], [])
    head = build_auxiliary_head("roi", cfg, input_shapes)
    with torch.autocast("cpu", torch.bfloat16):
        losses, _ = head(make_pyramid(sizes), targets)
    assert losses["loss_mask"].dtype == torch.float32 and (losses["loss_mask"] > 0) == (len(empty) == 1)
    sum(losses.values()).backward()
    assert [name for name, x in head.named_parameters() if x.grad is None] == []


@torch.no_grad()
def test_masks_of_given_detections(cfg, input_shapes, make_pyramid):
    """They get the masks that detectron2's inference gives to the head's own detections."""
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.ROI_MASK_HEAD.CONV_DIM = 8
    cfg.MODEL.RPN.POST_NMS_TOPK_TEST = 20
    pyramid = make_pyramid([(96, 128), (80, 90)])
    head = build_auxiliary_head("roi", cfg, input_shapes).eval()
    images, features = head._inputs(pyramid)
    own, _ = head.roi_heads(images, features, head.proposal_generator(images, features)[0])
    coarsest = pyramid.geometry.level_sizes[-1]
    geometry = dataclasses.replace(pyramid.geometry, shapes=pyramid.geometry.shapes[:-1])
    memory = FeaturePyramid(pyramid.tokens[:, :-coarsest], geometry)
    masks = [x.pred_masks.clone() for x in own]
    detections = head.inference(pyramid)
    assert not any(x.has("pred_masks") for x in detections)
    for x, mask in zip(head.predict_masks(memory, detections), masks):
        assert mask.shape == (len(x), 1, 28, 28) and len(x) > 10
        torch.testing.assert_close(x.pred_masks, mask)
