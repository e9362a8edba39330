"""The feed-forward network by the compiled library: against plain layers and finite differences."""

import math

import pytest
import torch
from torch.nn import functional as F

from codetr_d2.ops import feed_forward
from tests.ops.common import needs_cpp

HIDDEN = 4096  # 1024 rows of so many are a part


def make_inputs(rows=5, channels=6, hidden=11, outputs=7, dtype=torch.float64):
    """x, weight1, bias1, weight2, bias2."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(rows, channels), (hidden, channels), (hidden,), (outputs, hidden), (outputs,)]
    return [torch.randn(shape, generator=generator, dtype=torch.float64).to(dtype) for shape in shapes]


def plain(x, weight1, bias1, weight2, bias2):
    return F.linear(F.relu(F.linear(x, weight1, bias1)), weight2, bias2)


def run(function, inputs):
    """The output, and the gradients of all inputs."""
    leaves = [x.detach().requires_grad_() for x in inputs]
    output = function(*leaves)
    grad = (torch.arange(output.numel()) * 37 % 101 / 50 - 1).to(output.dtype).view_as(output)
    return output.detach(), *torch.autograd.grad(output, leaves, grad)


def assert_equal_to_plain(inputs, tolerance):
    for result, expected in zip(run(feed_forward, inputs), run(plain, inputs)):
        assert result.dtype == expected.dtype and result.shape == expected.shape
        scale = expected.abs().max().item() if expected.numel() else 1
        torch.testing.assert_close(result, expected, rtol=0, atol=tolerance * scale)


# Less than a part, exactly one, several and a rest.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)], ids=str)
@pytest.mark.parametrize("rows", [0, 1, 63, 65, 1024, 2100])
def test_rows(rows, dtype, tolerance):
    assert_equal_to_plain(make_inputs(rows=rows, hidden=HIDDEN, dtype=dtype), tolerance)


# Blocks of columns of every size and their remainders.
@pytest.mark.parametrize(("dtype", "tolerance"), [(torch.float32, 2e-6), (torch.float64, 1e-14)], ids=str)
@pytest.mark.parametrize("hidden", [1, 3, 20, 107, 256])
def test_columns(hidden, dtype, tolerance):
    assert_equal_to_plain(make_inputs(rows=130, hidden=hidden, dtype=dtype), tolerance)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize("hidden", [1, 107, HIDDEN])
def test_inference(hidden, dtype):
    inputs = make_inputs(rows=2100 if hidden == HIDDEN else 70, hidden=hidden, dtype=dtype)
    expected = plain(*inputs)
    tolerance = {torch.float32: 2e-6, torch.float64: 1e-14, torch.bfloat16: 4e-3}[dtype] * expected.abs().max().item()
    for x in inputs:
        x.requires_grad_()
    with torch.no_grad():
        torch.testing.assert_close(feed_forward(*inputs), expected, rtol=0, atol=tolerance)


@needs_cpp
def test_gradients_equal_finite_differences():
    inputs = [x.requires_grad_() for x in make_inputs()]
    assert torch.autograd.gradcheck(feed_forward, inputs)


@pytest.mark.parametrize("needed", range(5))
def test_gradient_of_one_input(needed):
    inputs = make_inputs(rows=70)
    inputs[needed].requires_grad_()
    results = [torch.autograd.grad(f(*inputs).square().sum(), inputs[needed])[0] for f in (feed_forward, plain)]
    torch.testing.assert_close(*results)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
def test_values_that_are_not_finite(dtype):
    """NaN of either sign stays, infinity too, minus infinity is zero: no divergence is hidden."""
    x, zeros = torch.ones(1, 1, dtype=dtype), torch.zeros(107, dtype=dtype)
    for value in (math.nan, math.inf, 1.0, 0.0):
        for weight in torch.tensor([value, -value], dtype=dtype):
            weights = weight.expand(107, 1), zeros, x.expand(1, 107), zeros[:1]
            ours, theirs = run(feed_forward, [x, *weights]), run(plain, [x, *weights])
            for a, b in zip(ours, theirs):
                torch.testing.assert_close(a, b, rtol=0, atol=0, equal_nan=True)
            with torch.no_grad():
                torch.testing.assert_close(feed_forward(x, *weights), theirs[0], rtol=0, atol=0, equal_nan=True)


def test_layouts():
    inputs = make_inputs(rows=130)
    expected = run(plain, inputs)
    views = [
        [x.t().contiguous().t() if x.dim() == 2 else torch.stack([x, x], dim=1)[:, 1] for x in inputs],
        [torch.stack([x, x], dim=-1)[..., 1] for x in inputs],
    ]
    for view in views:
        for a, b in zip(run(feed_forward, view), expected):
            torch.testing.assert_close(a, b)
    # Gradients of the output without strides.
    leaves = [x.detach().requires_grad_() for x in inputs]
    for a, b in zip(*(torch.autograd.grad(f(*leaves).sum(), leaves) for f in (feed_forward, plain))):
        torch.testing.assert_close(a, b)


def test_features_of_any_dimensions():
    x, *weights = make_inputs(rows=12)
    expected = plain(x, *weights)
    assert torch.equal(feed_forward(x.view(2, 3, 2, 6), *weights), expected.view(2, 3, 2, 7))


@needs_cpp
def test_the_library_computes_and_holds_no_second_tensor_of_hidden_features():
    inputs = make_inputs(rows=4096, hidden=HIDDEN, dtype=torch.float32)
    with torch.profiler.profile(profile_memory=True) as profile:
        run(feed_forward, inputs)
    names = {event.name for event in profile.events()}
    assert "codetr_d2::_feed_forward_cpp" in names and "codetr_d2::_feed_forward_cpp_backward" in names
    allocated = sum(max(event.self_cpu_memory_usage, 0) for event in profile.events())
    assert allocated < 1.6 * 4096 * HIDDEN * 4


@needs_cpp
def test_opcheck():
    """Schema, fake tensors, autograd registration, and tracing by the compiler with dynamic shapes."""
    inputs = [x.requires_grad_() for x in make_inputs(rows=70)]
    torch.library.opcheck(torch.ops.codetr_d2._feed_forward_cpp, (*inputs, True))


def test_compiled():
    inputs = make_inputs(rows=70)
    compiled = torch.compile(feed_forward, fullgraph=True, backend="aot_eager")
    for a, b in zip(run(compiled, inputs), run(feed_forward, inputs)):
        torch.testing.assert_close(a, b)


def test_autocast():
    inputs = make_inputs(rows=70, dtype=torch.float32)
    with torch.autocast("cpu", dtype=torch.bfloat16):
        ours, theirs = run(feed_forward, inputs), run(plain, inputs)
        with torch.no_grad():
            inferred = feed_forward(*inputs)
        double = [x.double() for x in inputs]
        torch.testing.assert_close(feed_forward(*double), plain(*double))
    assert ours[0].dtype == inferred.dtype == torch.bfloat16
    for a, b in zip((*ours, inferred), (*theirs, theirs[0])):
        torch.testing.assert_close(a, b)


@needs_cpp
@pytest.mark.parametrize("autocasts", [False, True])
def test_the_library_computes_inference_in_bfloat16(autocasts):
    inputs = [x.requires_grad_() for x in make_inputs(dtype=torch.float32 if autocasts else torch.bfloat16)]
    with torch.profiler.profile() as profile, torch.no_grad(), torch.autocast("cpu", torch.bfloat16, autocasts):
        feed_forward(*inputs)
    assert "codetr_d2::_feed_forward_cpp" in {event.name for event in profile.events()}


def test_gradients_in_bfloat16():
    inputs = make_inputs(rows=70, dtype=torch.bfloat16)
    for a, b in zip(run(feed_forward, inputs), run(plain, inputs)):
        torch.testing.assert_close(a, b)


@needs_cpp
@pytest.mark.parametrize("other", [1, 3], ids=["weight1", "weight2"])
def test_sizes_and_dtypes_that_do_not_fit(other):
    inputs = make_inputs()
    inputs[other] = inputs[other][:, :-1]
    with pytest.raises(RuntimeError, match="feed_forward: rows of sizes"):
        feed_forward(*inputs)
    inputs = make_inputs()
    inputs[other] = inputs[other].float()
    with pytest.raises(RuntimeError, match="feed_forward: rows are"):
        feed_forward(*inputs)
