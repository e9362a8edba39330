import numpy as np
import pytest
import torch
import torch.nn.functional as F
from detectron2.modeling.postprocessing import detector_postprocess
from detectron2.structures import BitMasks, Boxes, Instances, PolygonMasks
from scipy import ndimage

from codetr_d2.modeling.masks import RefineMaskHead
from codetr_d2.modeling.masks import refine as refine_mask
from codetr_d2.modeling.masks.refine import boundary, refine_at_boundary

LOSSES = ["loss_mask_14", "loss_mask_28", "loss_mask_56", "loss_mask_112", "loss_mask_iou"]
SIZES = [(96, 128), (80, 90)]


def build(channels=16, num_classes=3, strides=(8, 16, 32, 64, 128), **kwargs) -> RefineMaskHead:
    return RefineMaskHead(strides=list(strides), channels=channels, num_classes=num_classes, **kwargs)


def detect(image_size, boxes, classes) -> Instances:
    boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
    scores = torch.linspace(0.9, 0.1, len(boxes))
    return Instances(image_size, pred_boxes=boxes, scores=scores, pred_classes=torch.tensor(classes).long())


def add_ellipses(targets: Instances) -> Instances:
    """Give each object the ellipse that its box holds as its mask."""
    y, x = torch.meshgrid(*(torch.arange(n) + 0.5 for n in targets.image_size), indexing="ij")
    x0, y0, x1, y1 = (v.view(-1, 1, 1) for v in targets.gt_boxes.tensor.unbind(1))
    inside = ((2 * x - x0 - x1) / (x1 - x0)) ** 2 + ((2 * y - y0 - y1) / (y1 - y0)) ** 2 <= 1
    targets.gt_masks = BitMasks(inside)
    return targets


def published_shapes(num_classes: int) -> dict[str, tuple[int, ...]]:
    """The parameters of the published Co-DINO-Inst's ``mask_head`` and ``mask_iou_head``."""
    shapes = {}

    def conv(name, out_dim, in_dim, kernel, norm=False):
        if norm:
            shapes.update({f"{name}.conv.weight": (out_dim, in_dim, kernel, kernel)})
            shapes.update({f"{name}.norm_layer.{x}": (out_dim,) for x in ("weight", "bias")})
        else:
            shapes.update({f"{name}.weight": (out_dim, in_dim, kernel, kernel), f"{name}.bias": (out_dim,)})

    conv("mask_head.instance_convs.0", 256, 256, 3, norm=True)
    for i in range(2):
        conv(f"mask_head.semantic_convs.{i}", 256, 256, 3, norm=True)
    for i, dim in enumerate((256, 128, 64)):
        stage = f"mask_head.stages.{i}"
        conv(f"{stage}.semantic_transform_in", dim, 256, 1)
        conv(f"{stage}.fuse_conv.0", dim, 2 * dim + 1, 1)
        for k in (1, 2, 3):
            conv(f"{stage}.fuse_conv.1.dilation_conv_{k}.conv", dim, dim, 3)
        conv(f"{stage}.fuse_conv.1.merge_conv.conv", dim, dim, 1)
        conv(f"{stage}.fuse_transform_out", dim // 2 - 1, dim, 1)
        conv(f"mask_head.stage_instance_logits.{i}", num_classes, dim, 1)
    conv("mask_head.stage_instance_logits.3", 1, 32, 1)
    conv("mask_iou_head.convs.0", 256, 257, 3, norm=True)
    conv("mask_iou_head.convs.1", 256, 256, 3, norm=True)
    shapes |= {"mask_iou_head.fcs.0.weight": (1024, 12544), "mask_iou_head.fcs.0.bias": (1024,)}
    shapes |= {
        "mask_iou_head.fc_mask_iou.weight": (num_classes, 1024),
        "mask_iou_head.fc_mask_iou.bias": (num_classes,),
    }
    return shapes


@pytest.mark.parametrize(
    ("num_classes", "num_parameters"), [(80, (4_548_206, 14_111_056)), (1203, (5_054_679, 15_262_131))]
)
def test_parameters_are_the_published_ones(num_classes, num_parameters):
    with torch.device("meta"):
        head = build(256, num_classes, strides=(4, 8, 16, 32, 64))
    shapes = {
        f"mask_{name}" if name.startswith("iou_head.") else f"mask_head.{name}": tuple(x.shape)
        for name, x in head.state_dict().items()
    }
    assert shapes == published_shapes(num_classes)
    in_iou_head = sum(x.numel() for x in head.iou_head.parameters())
    assert (sum(x.numel() for x in head.parameters()) - in_iou_head, in_iou_head) == num_parameters


def blobs(n=4, size=28) -> torch.Tensor:
    """[n, size, size] smooth random logits, with masks that touch the borders."""
    return F.interpolate(torch.randn(n, 1, 6, 6), size=(size, size), mode="bilinear")[:, 0]


def test_boundary_is_where_neighbours_differ():
    masks = blobs() >= 0
    for mask, narrow, wide in zip(masks.numpy(), boundary(masks, 1).numpy(), boundary(masks, 2).numpy()):
        largest, smallest = (
            f(mask, size=3, mode="constant", cval=0) for f in (ndimage.maximum_filter, ndimage.minimum_filter)
        )
        assert np.array_equal(narrow, largest != smallest)
        assert narrow.any() and not narrow.all()
        objects = ndimage.convolve(mask.astype(int), np.ones((5, 5), int), mode="constant", cval=0)
        assert np.array_equal(wide, np.where(mask, 25 - objects, objects) > 2.5)
    full = torch.ones(1, 6, 6, dtype=torch.bool)
    assert boundary(full, 1)[0, 0].all() and not boundary(full, 1)[0, 2, 2]  # outside is background
    assert not boundary(~full, 1).any()


def test_finer_logits_count_near_the_boundary_only():
    coarse, fine = blobs(), torch.full((4, 56, 56), 100.0)
    result = refine_at_boundary(coarse, fine)
    taken = result == 100
    enlarged = torch.from_numpy(
        np.stack([ndimage.zoom(x, 2, order=1) for x in coarse.numpy()])
    )  # corners on corners: bilinear with align_corners
    torch.testing.assert_close(result[~taken], enlarged[~taken], rtol=1e-4, atol=1e-5)
    for mask, region in zip((coarse >= 0).numpy(), taken.numpy()):
        inner = 1.0 - boundary(torch.from_numpy(mask)[None], 1)[0].numpy()
        inner = ndimage.zoom(inner, 2, order=1)
        decided = abs(inner - 0.5) > 1e-5
        assert np.array_equal(region[decided], inner[decided] < 0.5)
    torch.testing.assert_close(refine_at_boundary(coarse[:, None], fine[:, None]), result[:, None])


def test_losses_computed_again(make_pyramid, make_targets):
    """From the head's predictions of the objects' own boxes; no detection overlaps an object."""
    pyramid = make_pyramid(SIZES)
    targets = [
        add_ellipses(make_targets(SIZES[0], [[10, 10, 60, 70], [70, 20, 120, 90]], [2, 0])),
        add_ellipses(make_targets(SIZES[1], [[5, 5, 50, 60]], [1])),
    ]
    head = build(loss_weight=2.0, iou_loss_weight=3.0)
    with torch.no_grad():
        for layer in head.stage_instance_logits:
            layer.weight.mul_(300)  # masks that are not all alike
    detections = [detect(SIZES[0], [[0, 0, 12, 8]], [0]), detect(SIZES[1], [], [])]
    losses = head.losses(pyramid, detections, targets)
    assert list(losses) == LOSSES

    boxes = [x.gt_boxes for x in targets]
    labels = torch.cat([x.gt_classes for x in targets])
    maps = pyramid.maps()
    logits, ious = head.predict(maps, head.semantic_maps(maps), boxes, labels)
    masks = [
        torch.cat([x.gt_masks.crop_and_resize(x.gt_boxes.tensor, size) for x in targets]) for size in (14, 28, 56, 112)
    ]
    expected = {
        "loss_mask_14": 2 * 0.5 * F.binary_cross_entropy_with_logits(logits[0][:, 0], masks[0].float()),
        "loss_mask_28": 2 * 0.75 * F.binary_cross_entropy_with_logits(logits[1][:, 0], masks[1].float()),
    }
    previous = logits[1][:, 0]
    for name, weight, i in (("loss_mask_56", 0.75, 2), ("loss_mask_112", 1.0, 3)):
        wide = (boundary(previous >= 0, 2) | boundary(masks[i - 1], 2)).float()
        wide = F.interpolate(wide[:, None], scale_factor=2, mode="bilinear", align_corners=True)[:, 0] >= 0.5
        assert 0.02 < wide.float().mean() < 0.98
        x, y = logits[i][:, 0][wide], masks[i][wide].float()
        expected[name] = 2 * weight * F.binary_cross_entropy_with_logits(x, y)
        previous = refine_at_boundary(previous, logits[i][:, 0])
    predicted = logits[1][:, 0] >= 0
    # The objects lie inside their boxes, so that the IoU there is that of the whole.
    iou = (predicted & masks[1]).sum((1, 2)) / (predicted | masks[1]).sum((1, 2))
    assert set((iou > 0).tolist()) == {True, False}  # masks that miss their object teach nothing
    expected["loss_mask_iou"] = 3 * F.mse_loss(ious[torch.arange(3), labels][iou > 0], iou[iou > 0])
    for name in LOSSES:
        torch.testing.assert_close(losses[name], expected[name], rtol=2e-2 if name.endswith("iou") else 1e-5, atol=0)


def test_detections_that_overlap_an_object_are_trained_on(make_targets):
    head = build(positives_per_image=3)
    targets = add_ellipses(make_targets(SIZES[0], [[10, 10, 60, 70], [70, 20, 120, 90]], [2, 0]))
    found = detect(SIZES[0], [[10, 10, 60, 60], [10, 10, 60, 35], [72, 20, 120, 90], [70, 20, 118, 90]], [1, 1, 1, 1])
    seen = set()
    for _ in range(30):
        samples = head._sample(found, targets)
        assert len(samples) == 3 and samples.image_size == SIZES[0]
        boxes = samples.proposal_boxes.tensor
        for box, label, mask in zip(boxes.tolist(), samples.gt_classes.tolist(), samples.gt_masks):
            left = box[0] < 50
            assert label == (2 if left else 0) and torch.equal(mask, targets.gt_masks.tensor[0 if left else 1])
            seen.add(tuple(box))
    # All but the box that covers less than half of the object.
    expected = [*targets.gt_boxes.tensor.tolist(), *found.pred_boxes.tensor[[0, 2, 3]].tolist()]
    assert seen == {tuple(x) for x in expected}


def test_iou_of_an_object_larger_than_its_box():
    """The box holds the left half of a rectangle; the predicted mask the upper half of the box: a quarter of it."""
    samples = Instances((40, 60), proposal_boxes=Boxes([[10.0, 10, 30, 30]]))
    rectangle = torch.zeros(1, 40, 60, dtype=torch.bool)
    rectangle[:, 10:30, 10:50] = True
    predicted, target = torch.zeros(1, 28, 28, dtype=torch.bool), torch.ones(1, 28, 28, dtype=torch.bool)
    predicted[:, :14] = True
    for masks in (BitMasks(rectangle), PolygonMasks([[[10, 10, 50, 10, 50, 30, 10, 30]]])):
        samples.gt_masks = masks
        torch.testing.assert_close(RefineMaskHead._iou_targets(predicted, target, [samples]), torch.tensor([0.25]))


def test_polygons_and_bitmaps_give_the_same_losses(make_pyramid, make_targets):
    pyramid = make_pyramid(SIZES[:1])
    targets = make_targets(SIZES[0], [[16, 16, 72, 72]], [1])
    head = build()
    losses = []
    for polygon in ([16, 16, 72, 16, 72, 72, 16, 72], None):
        if polygon:
            targets.gt_masks = PolygonMasks([[polygon]])
        else:
            targets.gt_masks = BitMasks.from_polygon_masks(targets.gt_masks, *SIZES[0])
        losses.append(head.losses(pyramid, [detect(SIZES[0], [[20, 14, 74, 76]], [0])], [targets]))
    for name in LOSSES:  # but for the pixels that the two draw differently
        torch.testing.assert_close(losses[0][name], losses[1][name], rtol=0.02, atol=0)


@pytest.mark.parametrize("empty", [(0,), (0, 1)])
def test_images_without_objects(make_pyramid, make_targets, empty):
    targets = [
        make_targets(size, [], []) if i in empty else add_ellipses(make_targets(size, [[10, 10, 60, 70]], [2]))
        for i, size in enumerate(SIZES)
    ]
    head = build()
    losses = head.losses(make_pyramid(SIZES), [detect(size, [[0, 0, 50, 50]], [1]) for size in SIZES], targets)
    assert all(x.isfinite() and x.dtype == torch.float32 for x in losses.values())
    assert (sum(losses.values()) > 0) == (len(empty) < 2)
    sum(losses.values()).backward()
    assert [name for name, x in head.named_parameters() if x.grad is None] == []


def test_every_process_takes_part_in_the_averages(make_pyramid, make_targets, monkeypatch):
    """Also one without objects: the others would wait for it."""
    reduced = []

    def reduce_mean(x):
        reduced.append(x.shape)
        return 2 * x  # as if the other processes had three times as much

    targets = add_ellipses(make_targets(SIZES[0], [[10, 10, 60, 70]], [2]))
    pyramid, nothing = make_pyramid(SIZES[:1]), [detect(SIZES[0], [], [])]
    head = build()
    alone = head.losses(pyramid, nothing, [targets])
    monkeypatch.setattr(refine_mask, "reduce_mean", reduce_mean)
    for name, loss in head.losses(pyramid, nothing, [targets]).items():
        torch.testing.assert_close(loss, alone[name] / 2)
    head.losses(pyramid, nothing, [make_targets(SIZES[0], [], [])])
    assert reduced == [(5,), (5,)]


def test_autocast(make_pyramid, make_targets):
    pyramid = make_pyramid(SIZES[:1])
    pyramid.tokens = pyramid.tokens.bfloat16()
    head = build()
    with torch.autocast("cpu", torch.bfloat16), torch.no_grad():
        losses = head.losses(
            pyramid,
            [detect(SIZES[0], [[0, 0, 50, 50]], [1])],
            [add_ellipses(make_targets(SIZES[0], [[5, 5, 60, 70]], [2]))],
        )
        [found] = head.eval().inference(pyramid, [detect(SIZES[0], [[0, 0, 50, 50]], [1])])
    assert all(x.isfinite() and x.dtype == torch.float32 for x in losses.values())
    assert found.pred_masks.dtype == found.mask_scores.dtype == torch.float32


@torch.no_grad()
def test_masks_do_not_depend_on_the_other_detections(make_pyramid, monkeypatch):
    """In chunks and one by one, in one batch and alone; images may have no detection."""
    pyramid = make_pyramid(SIZES)
    head = build().eval()
    boxes = [[10, 10, 60, 70], [70, 20, 120, 90], [0, 0, 128, 96], [30, 30, 38, 41], [50, 1, 51, 90]]
    [both, none] = head.inference(pyramid, [detect(SIZES[0], boxes, [0, 1, 2, 0, 1]), detect(SIZES[1], [], [])])
    assert both.pred_masks.shape == (5, 1, 112, 112) and none.pred_masks.shape == (0, 1, 112, 112)
    assert none.mask_scores.shape == (0,)
    assert ((both.mask_scores > 0) & (both.mask_scores < both.scores)).all()
    monkeypatch.setattr(refine_mask, "_CHUNK", 2)
    [chunks, _] = head.inference(pyramid, [detect(SIZES[0], boxes, [0, 1, 2, 0, 1]), detect(SIZES[1], [], [])])
    torch.testing.assert_close(both.pred_masks, chunks.pred_masks)
    torch.testing.assert_close(both.mask_scores, chunks.mask_scores)
    for size, found in ((SIZES[0], both), (SIZES[1], none)):
        pasted = detector_postprocess(found, 2 * size[0], 2 * size[1])
        assert pasted.pred_masks.shape == (len(found), 2 * size[0], 2 * size[1])


@pytest.mark.slow
def test_learns_a_few_objects(make_pyramid, make_targets):
    """Overfitted to a random pyramid, masks cover the objects to the edge and know that they do."""
    pyramid = make_pyramid(SIZES, channels=32)
    targets = [
        add_ellipses(make_targets(SIZES[0], [[10, 10, 60, 70], [70, 20, 120, 90]], [2, 0])),
        add_ellipses(make_targets(SIZES[1], [[5, 5, 50, 60]], [1])),
    ]
    detections = [detect(SIZES[0], [[12, 8, 62, 70]], [2]), detect(SIZES[1], [[5, 9, 55, 60]], [1])]
    head = build(channels=32, loss_weight=1.0, iou_loss_weight=1.0)
    optimizer = torch.optim.Adam(head.parameters(), lr=2e-3)
    totals = []
    for _ in range(80):
        loss = sum(head.losses(pyramid, detections, targets).values())
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
        totals.append(loss.item())
    assert totals[-1] < 0.7 * totals[0]
    found = [detect(size, x.gt_boxes.tensor.tolist(), x.gt_classes.tolist()) for size, x in zip(SIZES, targets)]
    with torch.no_grad():
        found = head.eval().inference(pyramid, found)
    for size, x, target in zip(SIZES, found, targets):
        quality = x.mask_scores / x.scores
        pasted = detector_postprocess(x, *size).pred_masks
        truth = target.gt_masks.tensor
        iou = (pasted & truth).sum((1, 2)) / (pasted | truth).sum((1, 2))
        assert (iou > 0.9).all(), iou
        assert (quality > 0.7).all(), quality
