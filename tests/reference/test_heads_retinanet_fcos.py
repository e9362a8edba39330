"""RetinaNet and FCOS alone, on recorded features: they equal the implementation that the published code builds on."""

import dataclasses
import json
import zlib
from types import SimpleNamespace

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances

from codetr_d2 import add_codetr_config
from codetr_d2.modeling.auxiliary import build_auxiliary_head
from codetr_d2.modeling.auxiliary.anchors import centerness_of
from codetr_d2.modeling.pyramid import FeaturePyramid, build_pyramid
from tests.reference.conftest import reference_dir
from tests.reference.recordings import ROOT

pytestmark = pytest.mark.slow

HEADS = ("retinanet", "fcos")
OUTPUTS = 1e-4
LOSSES = 1e-4  # relative
GRADIENTS = 1e-3  # relative
COORDINATES = 1e-3  # pixels, of what is handed on
PIXELS, SCORES = 0.02, 1e-4  # of detections

# (part of a recorded name, ours)
NAMES = [
    *(("cls_convs", "cls_tower"), ("reg_convs", "box_tower"), (".conv.", "."), (".gn.", ".norm."), (".scale", "")),
    *(("retina_cls", "cls_score"), ("conv_cls", "cls_score"), ("retina_reg", "box_deltas")),
    *(("conv_reg", "box_distances"), ("conv_centerness", "centerness"), ("loss_bbox", "loss_box")),
]


def our_name(name: str) -> str:
    """The recorded name of a parameter or loss -> ours."""
    for recorded, ours in NAMES:
        name = name.replace(recorded, ours)
    return name


def draw_parameter(name: str, shape: list[int], salt: str) -> torch.Tensor:
    """The value of a head's parameter by the recipe of these recordings (their README, "Format")."""
    rng = np.random.default_rng(zlib.crc32((salt + name).encode()))
    u = np.asarray(rng.random(tuple(shape)) * 2 - 1, dtype=np.float32)
    part, last = name.split(".")[0], name.split(".")[-1]
    is_classifier = part in ("retina_cls", "conv_cls")
    if last == "scale" or len(shape) == 1 and last == "weight":
        value = 1 + 0.1 * u
    elif len(shape) == 1:
        value = 0.1 * u + (-2.5 if is_classifier else 1.5 if part == "conv_reg" else 0.0)
    else:
        gain = 2.0 if is_classifier else 0.3 if part == "retina_reg" else 1.0
        value = u * np.float32(gain * np.sqrt(3 / np.prod(shape[1:])))
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def build_head(meta: dict) -> torch.nn.Module:
    """Our head as its config has it, with the recorded weights and settings of the detections."""
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "_base_" / "co_detr.yaml"))
    cfg.MODEL.CODETR.NUM_CLASSES = meta["num_classes"]
    shapes = [ShapeSpec(channels=meta["channels"], stride=stride) for stride in meta["strides"]]
    head = build_auxiliary_head(meta["head"], cfg, shapes)
    weights = {our_name(k): draw_parameter(k, v, meta["weight_salt"]) for k, v in meta["state_dict"].items()}
    head.load_state_dict(weights, strict=True)
    settings = meta["test_cfg"]
    head.pre_nms_topk, head.score_thresh = settings["nms_pre"], settings["score_thr"]
    head.nms_thresh, head.detections_per_image = settings["nms_iou"], settings["max_per_img"]
    return head


def recorded_pyramid(meta: dict) -> FeaturePyramid:
    """The features of a case."""
    rng = np.random.default_rng(meta["feature_seed"])
    sizes = [tuple(size) for size in meta["image_sizes_hw"]]
    levels = [
        torch.from_numpy(rng.standard_normal((len(sizes), meta["channels"], *shape)).astype(np.float32))
        for shape in meta["level_shapes"]
    ]
    padded = [tuple(size) for size in meta.get("padded_sizes_hw", sizes)]
    canvas = tuple(max(x) for x in zip(*padded))
    pyramid = build_pyramid(levels, meta["strides"], sizes, canvas)
    pyramid.geometry = dataclasses.replace(pyramid.geometry, padded_sizes=padded)
    pyramid.tokens.requires_grad_()
    return pyramid


def run(folder, case: str) -> SimpleNamespace:
    """A recording and what our head makes of its input."""
    with np.load(folder / "heads" / f"{case}.npz", allow_pickle=False) as file:
        recorded = {name: torch.from_numpy(file[name]) for name in file.files if name != "meta_json"}
        meta = json.loads(str(file["meta_json"]))
    head, pyramid = build_head(meta), recorded_pyramid(meta)
    targets = [
        Instances(size, gt_boxes=Boxes(recorded[f"gt_boxes_{i}"]), gt_classes=recorded[f"gt_labels_{i}"])
        for i, size in enumerate(pyramid.geometry.image_sizes)
    ]
    assigned, candidates = [], []  # of images with objects; what goes into non-maximum suppression
    assign, suppress = head.assign, head.suppress

    def recording_assign(*args):
        assigned.append(assign(*args))
        return assigned[-1]

    def recording_suppress(*args):
        candidates.append(args)
        return suppress(*args)

    head.assign, head.suppress = recording_assign, recording_suppress
    losses, samples = head(pyramid, targets)
    sum(losses.values()).backward()
    detections = head.eval().inference(pyramid)
    return SimpleNamespace(
        recorded=recorded,
        meta=meta,
        head=head,
        pyramid=pyramid,
        targets=targets,
        assigned=assigned,
        candidates=candidates,
        losses=losses,
        samples=samples,
        detections=detections,
    )


def pytest_generate_tests(metafunc):
    folder = reference_dir(metafunc.config)
    cases = [path.stem for path in sorted((folder / "heads").glob("*.npz")) if path.stem.startswith(HEADS)]
    metafunc.parametrize("case", cases, indirect=True, scope="module")


@pytest.fixture(scope="module")
def case(request):
    return run(reference_dir(request.config), request.param)


def test_predictions(case):
    """Every recorded channel of the raw outputs."""
    with torch.no_grad():
        levels = case.head.predict(case.pyramid.maps())
    kinds = ("cls", "reg", "ctr")
    for level, (outputs, shape) in enumerate(zip(levels, case.pyramid.geometry.shapes)):
        for kind, x in zip(kinds, outputs):
            x = x.unflatten(1, (-1, case.head.anchors_per_cell)).flatten(2).transpose(1, 2).unflatten(2, shape)
            if case.meta["head"] == "fcos" and kind == "reg":
                x = x.relu()
            about = case.meta["outputs"][f"{kind}_{level}"]
            assert list(x.shape) == about["full_shape"]
            assert x.mean().item() == pytest.approx(about["mean"], abs=OUTPUTS)
            assert x.norm().item() == pytest.approx(about["l2"], rel=OUTPUTS)
            x = x[:, :: about.get("channel_step", 1)]
            torch.testing.assert_close(x, case.recorded[f"{kind}_{level}"], rtol=OUTPUTS, atol=OUTPUTS)


def test_anchors(case):
    anchors = Boxes.cat(case.head.anchor_generator(case.pyramid.maps()))
    if "points" in case.recorded:
        assert torch.equal(anchors.get_centers(), case.recorded["points"])
    else:
        assert len(anchors) == case.meta["num_anchors"]
        assert torch.equal(anchors.tensor[:: case.meta["anchor_step"]], case.recorded["anchors"])


def test_assignment(case):
    """Of every cell, its part in training, and its object; of the positives, what is handed on."""
    assigned, classes = iter(case.assigned), case.meta["num_classes"]
    for i, target in enumerate(case.targets):
        labels, boxes = case.samples.labels[i], case.samples.target_boxes[i]
        expected = {key: case.recorded.get(f"{key}_{i}") for key in ("valid", "assigned", "pos_index")}
        valid = torch.ones(len(labels), dtype=torch.bool) if expected["valid"] is None else expected["valid"].bool()
        index = torch.full((len(labels),), -1)
        if len(target):
            index[valid] = next(assigned)
        if expected["assigned"] is not None:
            assert torch.equal(index, expected["assigned"].long())
        assert torch.equal(case.samples.boxes[i].any(1), valid & (index != -2))

        positive = labels < classes
        assert torch.equal(positive, index >= 0)
        assert torch.equal(positive.nonzero().squeeze(1), expected["pos_index"].long())
        assert torch.equal(labels[positive], case.recorded[f"pos_labels_{i}"])
        assert torch.equal(boxes[positive], case.recorded[f"pos_targets_{i}"])
        torch.testing.assert_close(
            case.samples.boxes[i][positive], case.recorded[f"pos_boxes_{i}"], rtol=0, atol=COORDINATES
        )
        if case.meta["head"] == "fcos" and f"pos_quality_{i}" in case.recorded:
            quality = centerness_of(case.samples.boxes[i][positive], boxes[positive])
            torch.testing.assert_close(quality, case.recorded[f"pos_quality_{i}"])
        assert torch.equal(case.samples.features[i], case.pyramid.tokens[i])
    assert next(assigned, None) is None


def test_losses(case):
    expected = {our_name(name): value for name, value in case.meta["losses_sum"].items()}
    assert {name: loss.item() for name, loss in case.losses.items()} == pytest.approx(expected, rel=LOSSES, abs=1e-7)


def test_gradients(case):
    """Of each parameter and of each level's map; where the recording has none, ours is 0."""
    expected = {our_name(name): norm or 0.0 for name, norm in case.meta["grad_norms"].items()}
    norms = {name: x.grad.norm().item() for name, x in case.head.named_parameters()}
    assert norms == pytest.approx(expected, rel=GRADIENTS, abs=1e-7)
    levels = case.pyramid.tokens.grad.split(case.pyramid.geometry.level_sizes, dim=1)
    norms = [x.norm().item() for x in levels]
    assert norms == pytest.approx(case.meta["grad_norms_levels"], rel=GRADIENTS, abs=1e-7)


def assert_found(expected, boxes, scores, labels):
    """Each expected (boxes, scores, labels) with an area is one of those given; each of these is used once."""
    free = torch.ones(len(boxes), dtype=torch.bool)
    for box, score, label in zip(*expected):
        if (box[2:] > box[:2]).all():
            distance = (boxes - box).abs().amax(1)
            distance[(labels != label) | ((scores - score).abs() > SCORES) | ~free] = float("inf")
            best = distance.argmin()
            assert distance[best] < PIXELS
            free[best] = False


def test_detections(case):
    """Boxes that clipping leaves without an area are among the recorded ones, and not among ours."""
    for i, found in enumerate(case.detections):
        expected = [case.recorded[f"det_{key}_{i}"] for key in ("boxes", "scores", "labels")]
        ours = [found.pred_boxes.tensor, found.scores, found.pred_classes]
        assert len(found) == len(expected[0])
        assert_found(expected, *ours)
        sure = found.scores > expected[1].min() + SCORES
        assert_found([x[sure] for x in ours], *expected)


def test_what_enters_suppression(case):
    if "pre_boxes_0" not in case.recorded:
        pytest.skip("this recording has detections alone")
    expected = [case.recorded[f"pre_{key}_0"] for key in ("boxes", "scores", "labels")]
    boxes, scores, labels = case.candidates[0]
    assert len(boxes) == (expected[0][:, 2:] > expected[0][:, :2]).all(1).sum()
    assert_found(expected, boxes, scores, labels)
