"""ROIAlign by the compiled library: against torchvision's and finite differences."""

import math

import pytest
import torch
import torchvision

from codetr_d2.ops import roi_align
from tests.ops.common import needs_cpp, run_copy

SCALE = 0.25


def make_maps(batch=2, channels=20, height=13, width=17, dtype=torch.float32):
    """Channels last, as levels of a pyramid are: parts of larger tokens."""
    generator = torch.Generator().manual_seed(0)
    tokens = torch.randn(batch, height * width + 5, channels, generator=generator, dtype=torch.float64).to(dtype)
    return tokens[:, 3 : 3 + height * width].transpose(1, 2).unflatten(2, (height, width))


def make_rois(batch=2, height=13, width=17, count=40, dtype=torch.float32):
    """Some inside, some across the border, some outside; some thin, some much larger than the map, some of no size."""
    generator = torch.Generator().manual_seed(1)
    size = torch.tensor([width, height]) / SCALE
    centre = (torch.rand(count, 2, generator=generator, dtype=torch.float64) * 1.6 - 0.3) * size
    half = torch.rand(count, 2, generator=generator, dtype=torch.float64) ** 3 * size
    half[1::8, 0] = 0.3
    half[2::8, 1] *= 20
    half[3::16] = 0
    image = torch.randint(batch, (count, 1), generator=generator)
    return torch.cat([image, centre - half, centre + half], dim=1).to(dtype)


def make_grad(output):
    """A gradient of the output that begins alike for outputs of any size."""
    return (torch.arange(output.numel()) * 37 % 101 / 50 - 1).to(output.dtype).view_as(output)


def run(function, maps, rois, output_size=(7, 7), sampling_ratio=0, aligned=True):
    """The output and the gradient of the maps."""
    leaf = maps.detach().requires_grad_()
    output = function(leaf, rois, output_size, SCALE, sampling_ratio, aligned)
    output.backward(make_grad(output))
    return output.detach(), leaf.grad


def compare(maps, rois, **options):
    for result, expected in zip(
        run(roi_align, maps, rois, **options), run(torchvision.ops.roi_align, maps, rois, **options)
    ):
        tolerance = 1e-12 if maps.dtype == torch.float64 else 2e-5
        assert result.dtype == maps.dtype and result.shape == expected.shape
        torch.testing.assert_close(result, expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("sampling_ratio", [0, -1, 1, 2, 5])
def test_equals_torchvision(dtype, aligned, sampling_ratio):
    compare(make_maps(dtype=dtype), make_rois(dtype=dtype), sampling_ratio=sampling_ratio, aligned=aligned)


# Blocks of channels of every size and their remainders.
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("channels", [0, 1, 3, 20, 107, 256])
@pytest.mark.parametrize("output_size", [(7, 7), (3, 14)], ids=str)
def test_sizes_of_the_output(channels, output_size, dtype):
    compare(make_maps(channels=channels, dtype=dtype), make_rois(dtype=dtype), output_size=output_size)


@pytest.mark.parametrize(("height", "width"), [(1, 1), (1, 9), (8, 1)])
@pytest.mark.parametrize("aligned", [True, False])
def test_tiny_maps(height, width, aligned):
    compare(make_maps(height=height, width=width), make_rois(height=height, width=width), aligned=aligned)


def test_no_roi():
    compare(make_maps(), make_rois(count=0))
    output, grad = run(roi_align, make_maps(), make_rois(count=0))
    assert output.shape == (0, 20, 7, 7) and not grad.any()


def test_layouts():
    maps, rois = make_maps(), make_rois()
    expected = run(roi_align, maps, rois)
    for view in (
        maps.contiguous(),
        maps.contiguous(memory_format=torch.channels_last),
        maps.flip(2).flip(2).mT.contiguous().mT,
        torch.stack([maps, maps], dim=4)[..., 1],
        torch.cat([maps, maps], dim=1)[:, 20:],
        torch.nn.functional.pad(maps, (2, 3, 1, 1)).contiguous(memory_format=torch.channels_last)[:, :, 1:-1, 2:-3],
    ):
        assert torch.equal(view, maps)
        assert all(torch.equal(a, b) for a, b in zip(run(roi_align, view, rois), expected))
    first = maps[:1].expand(2, -1, -1, -1)  # no stride between the images
    compare(first, rois)
    # A gradient of the output in another layout.
    leaf = maps.detach().requires_grad_()
    output = roi_align(leaf, rois, (7, 7), SCALE, 0, True)
    output.backward(make_grad(output).contiguous(memory_format=torch.channels_last))
    assert torch.equal(leaf.grad, expected[1])


@needs_cpp
def test_channels_last_is_read_as_it_lies_and_returned():
    maps, rois = make_maps().requires_grad_(), make_rois()
    grad_output = torch.ones(len(rois), 20, 7, 7)
    with torch.profiler.profile() as profile:
        output = roi_align(maps, rois, (7, 7), SCALE, 0, True)
        [grad] = torch.autograd.grad(output, maps, grad_output)
    names = {event.name for event in profile.events()}
    assert "codetr_d2::_roi_align_cpp" in names and "codetr_d2::_roi_align_cpp_backward" in names
    assert not names & {"aten::clone", "aten::contiguous", "aten::copy_"}
    assert grad.is_contiguous(memory_format=torch.channels_last)


def test_a_roi_over_a_large_map():
    maps = make_maps(batch=1, channels=1024, height=200, width=334)
    roi = torch.tensor([[0.0, -10, -10, 340 / SCALE, 210 / SCALE]])
    expected = run(torchvision.ops.roi_align, maps[:, :8], roi)
    for result, first in zip(run(roi_align, maps, roi), expected):
        torch.testing.assert_close(result[:, :8], first, rtol=2e-5, atol=2e-5)


@needs_cpp
@pytest.mark.parametrize("sampling_ratio", [0, 2])
@pytest.mark.parametrize("aligned", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_rois_that_are_not_finite(dtype, aligned, sampling_ratio):
    """They give zeros and no gradient, whatever stands in the map; their neighbours are not touched."""
    rois = make_rois(dtype=dtype, count=30)[:15]
    bad = [x.clone() for x in rois[:1].expand(12, -1)]
    for i, row in enumerate(bad):
        row[1 + i % 4] = (math.nan, math.inf, -math.inf)[i // 4]
    bad += [torch.tensor([1, -math.inf, -math.inf, math.inf, math.inf], dtype=dtype)]
    options = {"sampling_ratio": sampling_ratio, "aligned": aligned}
    maps = make_maps(dtype=dtype)
    output, grad = run(roi_align, maps, torch.cat([rois, torch.stack(bad)]), **options)
    expected = run(roi_align, maps, rois, **options)
    assert torch.equal(output[:15], expected[0]) and torch.equal(grad, expected[1])
    for x in run(roi_align, torch.full_like(maps, math.inf), torch.stack(bad), **options):
        assert not x.any()


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
@pytest.mark.parametrize("extent", [1e4, 1e7, 1e12, 1e19, 1e30, 3e38])
def test_finite_rois_of_any_size_end(extent, dtype):
    """The share of the samples that lie in the map is about its share of the ROI's area."""
    maps = torch.ones(1, 3, 13, 17, dtype=dtype)
    rois = torch.tensor([[0, -extent, -extent, extent, extent]], dtype=dtype)
    output, grad = run(roi_align, maps, rois, output_size=(3, 3))
    assert output.isfinite().all() and grad.isfinite().all()
    if extent <= 1e7:
        share = 3 * 17 / (2 * extent * SCALE) * 3 * 13 / (2 * extent * SCALE)
        assert output[0, 0].sum().item() == pytest.approx(share, rel=0.2)


def test_reversed_and_empty_rois():
    rois = torch.tensor([[0, 30, 10, 10, 30], [1, 10, 30, 30, 10], [0, 30, 30, 10, 10], [1, 20, 20, 20, 20.0]])
    for sampling_ratio in (0, 2):
        for aligned in (True, False):
            compare(make_maps(), rois, sampling_ratio=sampling_ratio, aligned=aligned)


@needs_cpp
def test_gradients_equal_finite_differences():
    maps = make_maps(channels=3, height=4, width=5, dtype=torch.float64).requires_grad_()
    rois = make_rois(height=4, width=5, count=12, dtype=torch.float64)
    for aligned in (True, False):
        assert torch.autograd.gradcheck(lambda x, a=aligned: roi_align(x, rois, (2, 3), SCALE, 0, a), maps)


@needs_cpp
def test_opcheck():
    """Schema, fake tensors, autograd registration, and tracing by the compiler with dynamic shapes."""
    for maps in (make_maps(), make_maps().contiguous()):
        torch.library.opcheck(
            torch.ops.codetr_d2._roi_align_cpp, (maps.requires_grad_(), make_rois(), SCALE, 7, 7, 0, True)
        )


def test_compiled():
    maps, rois = make_maps(channels=8), make_rois(count=9)
    compiled = torch.compile(roi_align, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, maps, rois), run(roi_align, maps, rois)):
        assert torch.equal(a, b)


@needs_cpp
@pytest.mark.parametrize("channels", [20, 107, 256])
def test_threads_change_no_bit(channels):
    threads = torch.get_num_threads()
    results = []
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results.append(run(roi_align, make_maps(channels=channels), make_rois(count=200)))
    finally:
        torch.set_num_threads(threads)
    for result in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(result, results[0]))


def test_half_precision_is_torchvisions():
    maps, rois = make_maps(dtype=torch.float16), make_rois(dtype=torch.float16)
    arguments = (maps, rois, (7, 7), SCALE, 0, True)
    assert torch.equal(roi_align(*arguments), torchvision.ops.roi_align(*arguments))


@needs_cpp
def test_arguments_that_do_not_fit():
    maps, rois = make_maps(), make_rois()
    for bad in (-1.0, 2.0, math.nan, math.inf):
        others = rois.clone()
        others[5, 0] = bad
        with pytest.raises(RuntimeError, match="ROI 5 is of image"):
            roi_align(maps, others, (7, 7), SCALE, 0, True)
    for wrong in ((maps[0], rois), (maps, rois[:, 1:]), (maps, rois.double()), (maps, rois[0])):
        with pytest.raises(RuntimeError, match="roi_align: "):
            roi_align(*wrong, (7, 7), SCALE, 0, True)
    with pytest.raises(RuntimeError, match="0 x 7 bins"):
        roi_align(maps, rois, (0, 7), SCALE, 0, True)


@pytest.mark.slow
@needs_cpp
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_kernels_of_older_processors(capability, tmp_path):
    """The tests above use the processor's best instruction set; the others agree with it."""
    script = """
import torch
from codetr_d2.ops import roi_align
results = []
for maps, rois in torch.load("inputs.pt", weights_only=True):
    output = roi_align(maps.requires_grad_(), rois, (7, 7), 0.25, 0, True)
    output.square().sum().backward()
    results.append([output.detach(), maps.grad])
torch.save(results, "results.pt")
"""
    cases = [
        [make_maps(channels=channels, dtype=dtype), make_rois(dtype=dtype)]
        for dtype in (torch.float32, torch.float64)
        for channels in (20, 107)
    ]
    torch.save(cases, tmp_path / "inputs.pt")
    run_copy(tmp_path, script, library=True, ATEN_CPU_CAPABILITY=capability)
    for (maps, rois), (output, grad) in zip(cases, torch.load(tmp_path / "results.pt", weights_only=True)):
        leaf = maps.detach().requires_grad_()
        expected = roi_align(leaf, rois, (7, 7), SCALE, 0, True)
        expected.square().sum().backward()
        torch.testing.assert_close(output, expected.detach(), rtol=1e-5, atol=1e-5)
        torch.testing.assert_close(grad, leaf.grad, rtol=1e-5, atol=1e-4)


@pytest.mark.slow
def test_without_the_library(tmp_path):
    script = """
import torch
from codetr_d2.ops import roi_align
maps, rois = torch.load("inputs.pt", weights_only=True)
torch.save(roi_align(maps, rois, (7, 7), 0.25, 0, True), "output.pt")
"""
    torch.save([make_maps(), make_rois()], tmp_path / "inputs.pt")
    run_copy(tmp_path, script, library=False)
    expected = torchvision.ops.roi_align(make_maps(), make_rois(), (7, 7), SCALE, 0, True)
    assert torch.equal(torch.load(tmp_path / "output.pt", weights_only=True), expected)
