"""The Triton kernels: in Triton's interpreter against eager code, and through Triton's compiler for GPUs.

Triton reads ``TRITON_INTERPRET`` when it is imported, for good: the interpreter runs in a process of its own, once for
all cases, with a copy of ``codetr_d2.ops`` alone.
"""

import importlib.util
import math

import pytest
import torch

from codetr_d2.ops import ms_deform_attn_eager
from tests.ops.common import change_floats, make_inputs, run, run_copy

pytestmark = pytest.mark.slow

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)

NAMES = ("output", "value", "locations", "weights")
SHAPES = [(4, 6), (3, 2), (1, 1), (2, 5), (1, 3)]
# Few programs, for the interpreter is slow. Queries fill blocks of 512 / width (as a power of 2), and one more or less.
SIZES = {
    "width 1": {"head_dim": 1, "levels": 1, "points": 1, "batch": 2, "heads": 3},
    "width 5, images, heads": {"head_dim": 5, "levels": 3, "points": 2, "batch": 2, "heads": 2},
    "width 24, two blocks": {"head_dim": 24, "levels": 2, "points": 1, "queries": 19},
    "width 32, five levels": {"head_dim": 32, "levels": 5, "points": 1, "queries": 17},
    "width 32, full block": {"head_dim": 32, "levels": 4, "points": 2, "queries": 16},
    "width 48, eight points": {"head_dim": 48, "levels": 1, "points": 8},
    "width 600": {"head_dim": 600, "levels": 1, "points": 1, "queries": 2},
}
EMPTY = {
    "no queries": {"queries": 0},
    "no images": {"batch": 0},
    "no points": {"points": 0},
    "no levels": {"levels": 0},
    "no tokens": {"shapes": [(0, 0)]},
    "empty levels": {"shapes": [(3, 4), (0, 5), (2, 0), (1, 2)]},
}


def make(levels=2, shapes=None, head_dim=8, points=2, batch=1, heads=1, queries=7):
    shapes = SHAPES[:levels] if shapes is None else shapes
    return list(make_inputs(shapes, head_dim=head_dim, points=points, batch=batch, heads=heads, queries=queries))


def make_cases():
    """Inputs by name, each with the gradient of its output."""
    cases = {name: make(**sizes) for name, sizes in (SIZES | EMPTY).items()}
    for dtype in (torch.float16, torch.bfloat16):
        value, *others = make()
        cases[f"{dtype} value"] = [value.to(dtype), *others]
        cases[f"{dtype} throughout"] = change_floats((value, *others), lambda x, dtype=dtype: x.to(dtype))

    corners = make(queries=3, head_dim=3)
    corners[2][:, 0] = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    corners[2][:, 1] = torch.tensor([[0.25, 0.375], [0.75, 0.625]])  # centres of cells, of the first level
    corners[2][:, 2] = torch.tensor([[-0.125, 0.5], [0.5, 1.125]])  # centres of cells next to it, where it ends
    cases["corners"] = corners

    outside = make(queries=9)
    outside[0][:] = math.inf
    for query, bad in enumerate([math.nan, math.inf, -math.inf, -0.6, 1.6, 3e38, -3e38, -7e9, 7e9]):
        outside[2][:, query] = 0.5
        outside[2][:, query, ..., query % 2] = bad
    cases["outside"] = outside
    mixed = make(queries=9)
    mixed[2][:, ::2, ..., 0, :] = outside[2][:, ::2, ..., 0, :]
    cases["some outside"] = mixed

    cases["strides"] = change_floats(make(heads=2), lambda x: x.repeat_interleave(2, 1)[:, ::2].mT.contiguous().mT)
    generator = torch.Generator().manual_seed(1)
    grads = {}
    for name, inputs in cases.items():
        output = inputs[0].shape[0], inputs[2].shape[1], inputs[0].shape[2] * inputs[0].shape[3]
        grads[name] = torch.randn(output, generator=generator).to(inputs[0].dtype)
    grads["strides"] = grads["strides"].mT.contiguous().mT
    return {name: (inputs, grads[name]) for name, inputs in cases.items()}


@pytest.fixture(scope="module")
def cases():
    return make_cases()


@pytest.fixture(scope="module")
def interpreted(cases, tmp_path_factory):
    """By the name of the case, what the kernels in the interpreter make of it: output and gradients."""
    script = """
import torch
from codetr_d2.ops import active_backend
from codetr_d2.ops.ms_deform_attn import triton_kernels
assert active_backend("cpu", "triton")[0] == "triton"
launches = []
launch = triton_kernels._launch
triton_kernels._launch = lambda kernel, *args: (launches.append(kernel), launch(kernel, *args))
results = {}
for name, (inputs, grad_output) in torch.load("cases.pt", weights_only=True).items():
    launches.clear()
    leaves = [x.requires_grad_() for x in inputs if isinstance(x, torch.Tensor)]
    output = torch.ops.codetr_d2.ms_deform_attn(*inputs, "triton")
    output.backward(grad_output)
    assert len(launches) == (2 if inputs[0].numel() and inputs[3].numel() else 0), name
    results[name] = [output.detach(), *(x.grad for x in leaves)]
torch.save(results, "results.pt")
"""
    folder = tmp_path_factory.mktemp("interpreted")
    torch.save(cases, folder / "cases.pt")
    run_copy(folder, script, library=False, TRITON_INTERPRET="1")
    return torch.load(folder / "results.pt", weights_only=True)


@pytest.mark.parametrize("name", [*SIZES, *EMPTY, "corners", "some outside", "strides"])
def test_float32_equals_eager(cases, interpreted, name):
    inputs, grad_output = cases[name]
    for what, result, expected in zip(NAMES, interpreted[name], run(ms_deform_attn_eager, inputs, grad_output)):
        scale = expected.abs().max().item() if expected.numel() else 1.0
        torch.testing.assert_close(result, expected, rtol=1e-5, atol=1e-5 * scale, msg=lambda m, what=what: what + m)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16], ids=str)
@pytest.mark.parametrize("kind", ["value", "throughout"])
def test_low_precision(cases, interpreted, dtype, kind):
    """Results are those of float64, but for float32 sums, rounded once."""
    inputs, grad_output = cases[f"{dtype} {kind}"]
    exact = run(ms_deform_attn_eager, change_floats(inputs, torch.Tensor.double), grad_output)
    for what, result, expected in zip(NAMES, interpreted[f"{dtype} {kind}"], exact):
        rounded = kind == "throughout" or what in ("output", "value")
        assert result.dtype == (dtype if rounded else torch.float32)
        relative = torch.finfo(dtype).eps if rounded else 1e-5
        scale = expected.abs().max().item()
        torch.testing.assert_close(result.double(), expected, rtol=relative, atol=1e-5 * scale, msg=what)


def test_locations_that_sample_nothing(interpreted):
    """Outside, infinite and NaN locations give zeros and zero gradients, whatever stands in the feature map."""
    for result in interpreted["outside"]:
        assert torch.equal(result, torch.zeros_like(result))


def test_compiler_autocast_and_refusals(tmp_path):
    """The operator is one node of compiled graphs; opcheck; training after inference mode; autocast; refusals."""
    script = """
import warnings
import torch
from codetr_d2.ops import ms_deform_attn_eager
from codetr_d2.ops.ms_deform_attn import triton_kernels
from codetr_d2.ops.ms_deform_attn.triton_kernels import ms_deform_attn_triton, ms_deform_attn_triton_backward
inputs = torch.load("inputs.pt", weights_only=True)
value, shapes, locations, weights = inputs

def ms_deform_attn(*x):
    return torch.ops.codetr_d2.ms_deform_attn(*x, "triton")

nodes = []
def backend(graph, example):
    nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return graph.forward
compiled = torch.compile(lambda *x: ms_deform_attn(*x) * 2, backend=backend, fullgraph=True)
torch.testing.assert_close(compiled(*inputs), 2 * ms_deform_attn_eager(*inputs))
assert sum("codetr_d2.ms_deform_attn" in x for x in nodes) == 1, nodes
leaves = [x.clone().requires_grad_() if isinstance(x, torch.Tensor) else x for x in inputs]
torch.library.opcheck(torch.ops.codetr_d2.ms_deform_attn, [*leaves, "triton"])

triton_kernels._level_table.cache_clear()
with torch.inference_mode():
    ms_deform_attn(*inputs)
assert triton_kernels._level_table.cache_info().currsize == 1
ms_deform_attn(*leaves).sum().backward()  # meets the table that was made in inference mode
assert triton_kernels._level_table.cache_info().misses == 1 and leaves[0].grad.abs().sum() > 0

with torch.autocast("cpu", torch.bfloat16):
    linear = torch.nn.Linear(value.shape[3], value.shape[3])
    low = linear(value)
    output = ms_deform_attn(low, shapes, locations, weights)
assert low.dtype == output.dtype == torch.bfloat16
output.sum().backward()
assert linear.weight.grad.abs().sum() > 0

def refused(message, call, *args):
    try:
        call(*args)
    except RuntimeError as error:
        assert message in str(error), error
    else:
        raise AssertionError(f"accepted, expected: {message}")

for index, change, message in [
    (0, lambda x: x[0], "value must be [B, S, heads, D]"),
    (0, lambda x: x.double(), "value must be float32, float16 or bfloat16"),
    (1, lambda x: x[:2], "spatial_shapes [4, 6] hold 24 tokens, value has 30"),
    (1, lambda x: [4, 6, 3], "spatial_shapes"),
    (1, lambda x: [-4, -6, 3, 2], "spatial_shapes"),
    (1, lambda x: [4, 6, 3, 1, 3, 1], "sampling_locations must be floating point [1, 7, 1, 3, 2, 2]"),
    (2, lambda x: x[..., :1], "sampling_locations must be floating point [1, 7, 1, 2, 2, 2]"),
    (2, lambda x: x[0], "sampling_locations must be floating point [1, Q, 1, 2, P, 2]"),
    (2, lambda x: x.long(), "sampling_locations must be floating point"),
    (2, lambda x: x.to("meta"), "sampling_locations must be floating point [1, 7, 1, 2, 2, 2] on cpu"),
    (3, lambda x: x[:, :2], "attention_weights must be floating point [1, 7, 1, 2, 2]"),
]:
    refused(message, ms_deform_attn_triton, *(change(x) if i == index else x for i, x in enumerate(inputs)))
refused("grad_output must be [1, 7, 8]", ms_deform_attn_triton_backward, torch.ones(1, 7, 1), *inputs)

torch.use_deterministic_algorithms(True)
refused("use_deterministic_algorithms", ms_deform_attn_triton_backward, torch.ones(1, 7, 8), *inputs)
torch.use_deterministic_algorithms(True, warn_only=True)
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    ms_deform_attn_triton_backward(torch.ones(1, 7, 8), *inputs)
assert any("does not repeat exactly" in str(x.message) for x in caught)
"""
    torch.save(make(), tmp_path / "inputs.pt")
    run_copy(tmp_path, script, library=False, TRITON_INTERPRET="1")


def test_kernels_compile_for_gpus(tmp_path):
    """Triton's compiler and NVIDIA's assembler, which Triton carries, take the kernels. No GPU is needed for that."""
    script = """
import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from codetr_d2.ops.ms_deform_attn import triton_kernels as kernels
from codetr_d2.ops.ms_deform_attn.operator import MIN_CAPABILITY
for kernel in (kernels._forward_kernel, kernels._backward_kernel):
    for width, value, other in [(32, "*fp32", "*fp32"), (32, "*bf16", "*fp32"), (24, "*fp16", "*fp16")]:
        types = {"value": value, "grad_output": value, "output": value, "grad_value": "*fp32"}
        types["levels"] = "*i32"
        types |= dict.fromkeys(["locations", "weights", "grad_locations", "grad_weights"], other)
        types |= dict.fromkeys(["num_queries", "num_tokens", "num_heads"], "i32")
        block = triton.next_power_of_2(width)
        constants = {"LEVELS": 4, "POINTS": 4, "WIDTH": width, "BLOCK_Q": kernels.TILE // block, "BLOCK_D": block}
        types |= dict.fromkeys(constants, "constexpr")
        source = ASTSource(kernel, {name: types[name] for name in kernel.arg_names}, constants)
        for major, minor in (MIN_CAPABILITY, (8, 0), (9, 0), (12, 0)):
            target = GPUTarget("cuda", 10 * major + minor, 32)
            assert triton.compile(source, target=target).asm["cubin"]
"""
    run_copy(tmp_path, script, library=False, TRITON_INTERPRET="0", TRITON_CACHE_DIR=str(tmp_path / "cache"))
