"""The Triton kernels: in Triton's interpreter against eager code, and through Triton's compiler for GPUs.

Triton reads ``TRITON_INTERPRET`` when it is imported, for good: the interpreter runs in a process of its own, once for
all cases, with a copy of ``codetr_d2.ops`` alone.
"""

import importlib.util
import math

import pytest
import torch

from codetr_d2.ops import ms_deform_attn_eager
from tests.ops.common import make_inputs, run, run_copy

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
        cases[f"{dtype} throughout"] = [x.to(dtype) if x.is_floating_point() else x for x in (value, *others)]

    corners = make(queries=3, head_dim=3)
    corners[3][:, 0] = torch.tensor([[0.0, 0.0], [1.0, 1.0]])
    corners[3][:, 1] = torch.tensor([[0.25, 0.375], [0.75, 0.625]])  # centres of cells, of the first level
    corners[3][:, 2] = torch.tensor([[-0.125, 0.5], [0.5, 1.125]])  # centres of cells next to it, where it ends
    cases["corners"] = corners

    outside = make(queries=9)
    outside[0][:] = math.inf
    for query, bad in enumerate([math.nan, math.inf, -math.inf, -0.6, 1.6, 3e38, -3e38, -7e9, 7e9]):
        outside[3][:, query] = 0.5
        outside[3][:, query, ..., query % 2] = bad
    cases["outside"] = outside
    mixed = make(queries=9)
    mixed[3][:, ::2, ..., 0, :] = outside[3][:, ::2, ..., 0, :]
    cases["some outside"] = mixed

    cases["strides"] = [
        x.repeat_interleave(2, 1)[:, ::2].mT.contiguous().mT if x.is_floating_point() else x for x in make(heads=2)
    ]
    cases["strides"][1] = cases["strides"][1].t().contiguous().t()
    cases["strides"][2] = cases["strides"][2].repeat_interleave(2)[::2]
    generator = torch.Generator().manual_seed(1)
    grads = {}
    for name, inputs in cases.items():
        output = inputs[0].shape[0], inputs[3].shape[1], inputs[0].shape[2] * inputs[0].shape[3]
        grads[name] = torch.randn(output, generator=generator).to(inputs[0].dtype)
    grads["strides"] = grads["strides"].mT.contiguous().mT

    # The levels claim more tokens than there are, and lie between tokens of NaN: nobody may touch those.
    wrong = make()
    wrong[0] = torch.full((3, *wrong[0].shape[1:]), math.nan).index_copy_(0, torch.tensor([1]), wrong[0])[1:2]
    wrong[1] = wrong[1] * 2
    wrong[2] = wrong[2] - 5
    cases["wrong levels"], grads["wrong levels"] = wrong, torch.ones(1, 7, 8)
    return {name: (inputs, grads[name]) for name, inputs in cases.items()}


@pytest.fixture(scope="module")
def cases():
    return make_cases()


@pytest.fixture(scope="module")
def interpreted(cases, tmp_path_factory):
    """By the name of the case, what the kernels in the interpreter make of it: output and gradients."""
    script = """
import torch
from codetr_d2.ops import active_backend, ms_deform_attn, set_backend, triton_kernels
set_backend("triton")
assert active_backend("cpu")[0] == "triton"
launches = []
launch = triton_kernels._launch
triton_kernels._launch = lambda kernel, *args: (launches.append(kernel), launch(kernel, *args))
results = {}
for name, (inputs, grad_output) in torch.load("cases.pt", weights_only=True).items():
    launches.clear()
    leaves = [x.requires_grad_() if x.is_floating_point() else x for x in inputs]
    output = ms_deform_attn(*leaves)
    output.backward(grad_output)
    assert len(launches) == (2 if inputs[0].numel() and inputs[4].numel() else 0), name
    results[name] = [output.detach(), inputs[0].grad, inputs[3].grad, inputs[4].grad]
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
    exact = run(ms_deform_attn_eager, [x.double() if x.is_floating_point() else x for x in inputs], grad_output)
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


def test_wrong_levels_touch_nothing_outside(interpreted):
    output, *grads = interpreted["wrong levels"]
    assert output.abs().sum() > 0
    for result in (output, *grads):
        assert result.isfinite().all()


def test_compiler_autocast_and_refusals(tmp_path):
    """The operator is one node of compiled graphs; opcheck; autocast; what does not fit is refused, before a launch."""
    script = """
import warnings
import torch
from codetr_d2.ops import ms_deform_attn, ms_deform_attn_eager, set_backend
from codetr_d2.ops.triton_kernels import ms_deform_attn_triton, ms_deform_attn_triton_backward
inputs = torch.load("inputs.pt", weights_only=True)
value, shapes, starts, locations, weights = inputs
set_backend("triton")

nodes = []
def backend(graph, example):
    nodes.extend(str(node.target) for node in graph.graph.nodes if node.op == "call_function")
    return graph.forward
compiled = torch.compile(lambda *x: ms_deform_attn(*x) * 2, backend=backend, fullgraph=True)
torch.testing.assert_close(compiled(*inputs), 2 * ms_deform_attn_eager(*inputs))
assert sum("codetr_d2.ms_deform_attn" in x for x in nodes) == 1, nodes
leaves = [x.clone().requires_grad_(x.is_floating_point()) for x in inputs]
torch.library.opcheck(torch.ops.codetr_d2.ms_deform_attn, leaves)

with torch.autocast("cpu", torch.bfloat16):
    linear = torch.nn.Linear(value.shape[3], value.shape[3])
    low = linear(value)
    output = ms_deform_attn(low, shapes, starts, locations, weights)
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
    (1, lambda x: x[:1], "spatial_shapes must be int64 [2, 2] on cpu"),
    (1, lambda x: x.int(), "spatial_shapes must be int64"),
    (2, lambda x: x[:1], "spatial_shapes must be int64 [1, 2]"),
    (2, lambda x: x.float(), "level_start_index must be int64 [2]"),
    (3, lambda x: x[..., :1], "sampling_locations must be floating point [1, 7, 1, 2, 2, 2]"),
    (3, lambda x: x[0], "sampling_locations must be floating point [1, Q, 1, 2, P, 2]"),
    (3, lambda x: x.long(), "sampling_locations must be floating point"),
    (3, lambda x: x.to("meta"), "sampling_locations must be floating point [1, 7, 1, 2, 2, 2] on cpu"),
    (4, lambda x: x[:, :2], "attention_weights must be floating point [1, 7, 1, 2, 2]"),
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
from codetr_d2.ops import triton_kernels as kernels
from codetr_d2.ops.ms_deform_attn import MIN_CAPABILITY
for kernel in (kernels._forward_kernel, kernels._backward_kernel):
    for width, value, other in [(32, "*fp32", "*fp32"), (32, "*bf16", "*fp32"), (24, "*fp16", "*fp16")]:
        types = {"value": value, "grad_output": value, "output": value, "grad_value": "*fp32"}
        types |= dict.fromkeys(["spatial_shapes", "level_start_index"], "*i64")
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
