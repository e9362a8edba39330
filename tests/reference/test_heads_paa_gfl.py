"""The PAA and GFL heads against recordings of the library that the published code is built on.

``heads/`` in the folder of recordings holds a file for each head and scene; a folder without it is fine.
"""

import dataclasses
import json
import zlib
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances
from torch import Tensor

from codetr_d2 import add_codetr_config
from codetr_d2.modeling.assigners.paa import select_by_mixture
from codetr_d2.modeling.auxiliary import build_auxiliary_head, paa
from codetr_d2.modeling.pyramid import FeaturePyramid, build_pyramid
from tests.reference.conftest import reference_dir

pytestmark = pytest.mark.slow

# Starts of the recorded parameters' names, and ours.
NAMES = {
    **{f"{tower}_convs.0.{part}": f"{ours}_tower.0{own}" for tower, ours in (("cls", "cls"), ("reg", "box"))
       for part, own in (("conv", ""), ("gn", ".norm"))},
    "scales.{n}.scale": "scales.{n}",
    "gfl_cls": "cls_score",
    "gfl_reg": "box_sides",
    "atss_cls": "cls_score",
    "atss_reg": "box_deltas",
    "atss_centerness": "iou",
}  # fmt: skip
LOSSES = {"loss_cls": "loss_cls", "loss_bbox": "loss_box", "loss_dfl": "loss_dfl", "loss_iou": "loss_iou"}
# The raw outputs, in the order of the head's predictions.
OUTPUTS = {"gfl": ("cls", "dist"), "paa": ("cls", "reg", "iou")}


def pytest_generate_tests(metafunc):
    folder = reference_dir(metafunc.config) / "heads"
    heads = ["paa"] if metafunc.function.__name__.startswith("test_paa_") else list(OUTPUTS)
    cases = sorted(path for head in heads for path in folder.glob(f"{head}_*.npz"))
    metafunc.parametrize("recorded", cases, ids=lambda path: path.stem, indirect=True, scope="module")


@dataclasses.dataclass
class Recorded:
    """A recording, and our head with its weights, inputs and targets.

    Attributes:
        z: the arrays of the recording.
        meta: its meta block.
        head: ours.
        pyramid: the input; its tokens want a gradient.
        targets: the objects of each image.
    """

    z: dict[str, Tensor]
    meta: dict
    head: torch.nn.Module
    pyramid: FeaturePyramid
    targets: list[Instances]

    @property
    def images(self) -> range:
        return range(len(self.targets))


def draw_parameter(name: str, shape: list[int], salt: str) -> Tensor:
    """The value of a head's parameter, by the recipe of the recordings."""
    u = np.random.default_rng(zlib.crc32((salt + name).encode())).random(tuple(shape)) * 2 - 1
    u = np.asarray(u, dtype=np.float32)
    predictor, last = name.split(".")[0], name.split(".")[-1]
    if last == "scale" or (len(shape) == 1 and last == "weight"):
        value = 1 + 0.1 * u
    elif len(shape) == 1:
        value = 0.1 * u - (2.5 if predictor.endswith("_cls") else 0.0) + (1.5 if predictor == "conv_reg" else 0.0)
    else:
        gain = 2 if predictor.endswith("_cls") or predictor == "gfl_reg" else 0.3 if predictor == "retina_reg" else 1
        value = u * np.float32(gain * np.sqrt(3 / np.prod(shape[1:])))
    return torch.from_numpy(np.asarray(value, dtype=np.float32))


def our_name(name: str) -> str:
    """Our name of a recorded parameter."""
    for theirs, ours in NAMES.items():
        for n in range(5) if "{n}" in theirs else [0]:
            if name == theirs.format(n=n) or name.startswith(theirs.format(n=n) + "."):
                return name.replace(theirs.format(n=n), ours.format(n=n))
    raise KeyError(name)


def read(path: Path) -> Recorded:
    """A recording with our head, ready to run."""
    with np.load(path, allow_pickle=False) as file:
        z = {name: torch.from_numpy(file[name]) for name in file.files if name != "meta_json"}
        meta = json.loads(str(file["meta_json"]))
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.MODEL.CODETR.NUM_CLASSES = meta.get("num_classes", meta.get("classes"))
    channels = meta.get("channels", 64)
    strides = meta.get("strides", [8, 16, 32, 64, 128])
    head = build_auxiliary_head(meta["head"], cfg, [ShapeSpec(channels=channels, stride=stride) for stride in strides])
    salt = meta.get("weight_salt", meta.get("salt"))
    weights = {our_name(name): draw_parameter(name, shape, salt) for name, shape in meta["state_dict"].items()}
    head.load_state_dict(weights, strict=True)

    sizes = [tuple(x) for x in meta["image_sizes_hw"]]
    rng = np.random.default_rng(meta["feature_seed"])
    maps = [rng.standard_normal((len(sizes), channels, *shape)).astype(np.float32) for shape in meta["level_shapes"]]
    batch_shape = tuple(max(x) for x in zip(*sizes))
    pyramid = build_pyramid(list(map(torch.from_numpy, maps)), strides, sizes, batch_shape)
    padded_sizes = [tuple(x) for x in meta.get("padded_sizes_hw", sizes)]
    pyramid.geometry = dataclasses.replace(pyramid.geometry, padded_sizes=padded_sizes)
    pyramid.tokens.requires_grad_()
    targets = [
        Instances(size, gt_boxes=Boxes(z[f"gt_boxes_{i}"]), gt_classes=z[f"gt_labels_{i}"])
        for i, size in enumerate(sizes)
    ]
    return Recorded(z, meta, head, pyramid, targets)


@pytest.fixture(scope="module")
def recorded(request):
    return read(request.param)


def listen(head: torch.nn.Module, method: str) -> list[tuple[tuple, object]]:
    """What a method of the head is given and what it returns, from now on."""
    calls, original = [], getattr(type(head), method)

    def recording(*args):
        calls.append((args, original(head, *args)))
        return calls[-1][1]

    setattr(head, method, recording)
    return calls


def test_raw_outputs(recorded):
    with torch.no_grad():
        predictions = recorded.head.predict(recorded.pyramid.maps())
    for level, ((height, width), ours) in enumerate(zip(recorded.meta["level_shapes"], predictions)):
        for name, x in zip(OUTPUTS[recorded.meta["head"]], ours, strict=True):
            key = f"{name}_{level}"
            x = x.unflatten(1, (height, width)).flatten(3) if x.dim() == 3 else x.unflatten(1, (height, width, 1))
            x = (x if x.dim() == 4 else x.unsqueeze(3)).permute(0, 3, 1, 2)
            step = recorded.meta["outputs"][key]["channel_step"]
            torch.testing.assert_close(x[:, ::step], recorded.z[key], rtol=1e-4, atol=1e-4)


def test_assignment_and_candidates(recorded):
    z, head, num_classes = recorded.z, recorded.head, recorded.head.num_classes
    assigned, refined = listen(head, "assign"), listen(head, "refine")
    with torch.no_grad():
        _, samples = head(recorded.pyramid, recorded.targets)
    del head.assign, head.refine
    anchors = torch.cat([x.tensor for x in head.anchor_generator(recorded.pyramid.maps())])
    torch.testing.assert_close(anchors[:: recorded.meta.get("anchor_step", 1)], z["anchors"], rtol=0, atol=1e-5)
    [(_, final)] = refined
    for i in recorded.images:
        valid = z[f"valid_{i}"].bool()
        expected = z[f"assigned_{i}"].long()
        if len(recorded.targets[i]):
            assert torch.equal(assigned.pop(0)[1], expected[valid])
        assert torch.equal(final[i], z.get(f"assigned_final_{i}", expected).long())
        assert torch.equal((samples.boxes[i] != 0).any(1), valid & (expected != -2))
        [index] = (samples.labels[i] < num_classes).nonzero(as_tuple=True)
        assert torch.equal(index, z[f"pos_index_{i}"].long())
        assert torch.equal(samples.labels[i][index], z[f"pos_labels_{i}"])
        torch.testing.assert_close(samples.boxes[i][index], z[f"pos_boxes_{i}"], rtol=0, atol=1e-3)
        torch.testing.assert_close(samples.target_boxes[i][index], z[f"pos_targets_{i}"], rtol=0, atol=1e-3)
    assert not assigned


def test_losses_and_gradients(recorded):
    head, tokens, meta = recorded.head, recorded.pyramid.tokens, recorded.meta
    losses, _ = head(recorded.pyramid, recorded.targets)
    expected = {LOSSES[name]: value for name, value in meta["losses_sum"].items()}
    assert {name: loss.item() for name, loss in losses.items()} == pytest.approx(expected, rel=1e-4, abs=1e-8)

    gradients = torch.autograd.grad(sum(losses.values()), [tokens, *head.parameters()])
    ours = {name: x.norm().item() for (name, _), x in zip(head.named_parameters(), gradients[1:])}
    expected = {our_name(name): norm or 0.0 for name, norm in meta["grad_norms"].items()}  # none without a positive
    assert ours == pytest.approx(expected, rel=1e-3, abs=1e-7)
    levels = gradients[0].split(recorded.pyramid.geometry.level_sizes, dim=1)
    assert [x.norm().item() for x in levels] == pytest.approx(meta["grad_norms_levels"], rel=1e-3, abs=1e-7)


def has_area(boxes: Tensor) -> Tensor:
    return (boxes[:, 2:] > boxes[:, :2]).all(1)


def check_found(boxes: Tensor, scores: Tensor, labels: Tensor, expected: Callable[[str], Tensor]) -> None:
    """Each recorded detection with an area is one of ours, and the other way round, by box, score and label."""
    kept = has_area(expected("boxes"))
    theirs = [expected(x)[kept].float() for x in ("boxes", "scores", "labels")]
    ours = [boxes, scores, labels.float()]
    if kept.all():
        assert len(theirs[0]) == len(boxes)
    same = (theirs[0][:, None] - ours[0]).abs().amax(-1) < 0.02
    same &= ((theirs[1][:, None] - ours[1]).abs() < 1e-4) & (theirs[2][:, None] == ours[2])
    assert same.any(1).all()
    if kept.all():
        assert same.any(0).all()


def detect(recorded: Recorded) -> list[Instances]:
    return recorded.head.inference(recorded.pyramid)


def test_detections(recorded):
    for i, found in enumerate(detect(recorded)):
        check_found(
            found.pred_boxes.tensor, found.scores, found.pred_classes, lambda name, i=i: recorded.z[f"det_{name}_{i}"]
        )


def test_what_enters_suppression(recorded):
    calls = listen(recorded.head, "suppress")
    detect(recorded)
    del recorded.head.suppress
    for i, ((boxes, scores, labels), _) in enumerate(calls):
        if f"pre_boxes_{i}" in recorded.z:
            check_found(boxes, scores, labels, lambda name, i=i: recorded.z[f"pre_{name}_{i}"])
        if "pre_nms_count" in recorded.meta:
            count = recorded.meta["pre_nms_count"][i]
            assert len(boxes) <= count  # they count boxes without an area too
            if len(boxes) == count:
                sums = [x.double().sum().item() for x in (scores, boxes, labels)]
                assert sums == pytest.approx(recorded.meta["pre_nms_sums"][i], rel=1e-5)


def test_paa_candidates(recorded, monkeypatch):
    """The losses that the mixtures are fitted to, and what these choose by the recorded ones."""
    given, nothing = {}, torch.zeros(0)  # some recordings leave out what an image without objects has not

    def select(losses, objects, levels, topk):
        given["losses"] = losses
        theirs = torch.cat([recorded.z.get(f"candidate_losses_{i}", nothing) for i in recorded.images])
        given["positive"] = select_by_mixture(theirs, objects, levels, topk)
        return given["positive"]

    monkeypatch.setattr(paa, "select_by_mixture", select)
    with torch.no_grad():
        recorded.head(recorded.pyramid, recorded.targets)
    counts = [len(recorded.z.get(f"candidate_index_{i}", nothing)) for i in recorded.images]
    for i, (losses, positive) in enumerate(
        zip(given["losses"].split(counts), given["positive"].split(counts), strict=True)
    ):
        index = recorded.z.get(f"candidate_index_{i}", nothing).long()
        expected = recorded.z.get(f"candidate_losses_{i}", nothing)
        torch.testing.assert_close(losses, expected, rtol=1e-4, atol=1e-5)
        assert torch.equal(positive, recorded.z.get(f"assigned_final_{i}", nothing)[index] >= 0)


def test_paa_detections_without_score_voting(recorded, monkeypatch):
    monkeypatch.setattr(recorded.head, "score_voting", False)
    for i, found in enumerate(detect(recorded)):
        check_found(
            found.pred_boxes.tensor,
            found.scores,
            found.pred_classes,
            lambda name, i=i: recorded.z[f"det_novote_{name}_{i}"],
        )
