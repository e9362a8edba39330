"""Non-maximum suppression by the compiled library: against torchvision's, box by box."""

import pytest
import torch
import torchvision

from codetr_d2.ops import FastNMS
from tests.ops.common import needs_cpp, run_copy


def make_boxes(count, size, dtype=torch.float32):
    """Boxes in a square of 500, at most of this size, and their scores, of which many are equal."""
    generator = torch.Generator().manual_seed(0)
    corner, sides = (torch.rand(count, 2, generator=generator) * x for x in (500, size))
    boxes = torch.cat((corner, corner + sides), dim=1)
    if size < 20:
        boxes = boxes.round()  # some have no area, some are equal, and their IoU is a simple fraction
    scores = torch.rand(count, generator=generator)
    scores[::3] = 0.5
    return boxes.to(dtype), scores.to(dtype)


def ours(*args):
    with FastNMS():
        return torchvision.ops.nms(*args)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("size", [5, 40, 300])
@pytest.mark.parametrize("count", [0, 1, 15, 16, 17, 500, 3000])
def test_equals_torchvision(count, size, dtype):
    boxes, scores = make_boxes(count, size, dtype)
    for threshold in (-1.0, 0.0, 0.25, 0.5, 0.6, 0.7, 1.0):
        assert torch.equal(ours(boxes, scores, threshold), torchvision.ops.nms(boxes, scores, threshold))


@needs_cpp
@pytest.mark.parametrize("capability", ["default", "avx2", "avx512"])
def test_instruction_sets(capability, tmp_path):
    """On an x86-64 processor, with the kernels of each set that it has."""
    boxes, scores = make_boxes(2000, 60)
    torch.save((boxes, scores, torchvision.ops.nms(boxes, scores, 0.7)), tmp_path / "case.pth")
    run_copy(
        tmp_path,
        "import torch; from codetr_d2.ops import FastNMS\n"
        "boxes, scores, kept = torch.load('case.pth', weights_only=True)\n"
        "assert torch.equal(torch.ops.codetr_d2._nms_cpp(boxes, scores, 0.7), kept)",
        library=True,
        ATEN_CPU_CAPABILITY=capability,
    )


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float16], ids=str)
def test_the_library_computes_what_it_can(dtype):
    boxes, scores = make_boxes(30, 40, dtype)
    with torch.profiler.profile() as profile:
        kept = ours(boxes.float(), scores.float(), 0.5)
    assert "codetr_d2::_nms_cpp" in {event.name for event in profile.events()}
    assert len(kept) > 1


def test_of_several_groups():
    """As detectron2 calls it, for each level of a pyramid, and by one call where there are few boxes."""
    for count in (300, 3000):
        boxes, scores = make_boxes(count, 60)
        groups = torch.arange(count) % 3
        with FastNMS():
            kept = torchvision.ops.batched_nms(boxes, scores, groups, 0.5)
        assert torch.equal(kept, torchvision.ops.batched_nms(boxes, scores, groups, 0.5))


def test_inputs_are_not_changed():
    boxes, scores = make_boxes(100, 60)
    copies = boxes.clone(), scores.clone()
    ours(boxes, scores, 0.5)
    assert torch.equal(boxes, copies[0]) and torch.equal(scores, copies[1])
    double = torch.stack((boxes, boxes), dim=2)[..., 1], torch.stack((scores, scores), dim=1)[:, 1]
    assert torch.equal(ours(*double, 0.5), ours(boxes, scores, 0.5))


@needs_cpp
def test_what_does_not_fit():
    boxes, scores = make_boxes(10, 60)
    for bad in ((boxes[:, :3], scores), (boxes, scores[:-1]), (boxes, scores.double()), (boxes[0], scores)):
        with pytest.raises(RuntimeError, match="nms: expected"):
            ours(*bad, 0.5)
