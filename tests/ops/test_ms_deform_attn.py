"""The deformable attention operator: its backends against loops, each other and finite differences."""

import functools
import importlib
import math
import sys
import warnings
from types import SimpleNamespace

import pytest
import torch

from codetr_d2.errors import InputError
from codetr_d2.ops import active_backend, check_backend, ms_deform_attn_eager
from tests.ops.common import call_function, change_floats, make_inputs, needs_cpp, run, run_copy

BACKENDS = [pytest.param("cpp", marks=needs_cpp), "eager"]
OP = torch.ops.codetr_d2.ms_deform_attn
BOTH_CALLS = pytest.mark.parametrize("call", [OP, call_function], ids=["op", "function"])


def by(backend, call=OP):
    """The operator, computed by one backend."""
    return lambda *inputs: call(*inputs, backend)


def attend_by_loops(value, spatial_shapes, locations, weights):
    """The definition, one tap at a time in Python's floats."""
    batch, queries, heads, levels, points, _ = locations.shape
    head_dim = value.shape[3]
    output = torch.zeros(batch, queries, heads, head_dim, dtype=torch.float64)
    for b, q, h, level, p in torch.cartesian_prod(*map(torch.arange, locations.shape[:5])).tolist():
        height, width = spatial_shapes[2 * level : 2 * level + 2]
        first = sum(h * w for h, w in zip(spatial_shapes[: 2 * level : 2], spatial_shapes[1 : 2 * level : 2]))
        x = locations[b, q, h, level, p, 0].item() * width - 0.5
        y = locations[b, q, h, level, p, 1].item() * height - 0.5
        if not (math.isfinite(x) and math.isfinite(y)):
            continue
        for column in (math.floor(x), math.floor(x) + 1):
            for row in (math.floor(y), math.floor(y) + 1):
                if 0 <= column < width and 0 <= row < height:
                    share = (1 - abs(x - column)) * (1 - abs(y - row)) * weights[b, q, h, level, p].item()
                    token = first + row * width + column
                    output[b, q, h] += share * value[b, token, h].double()
    return output.flatten(2)


@pytest.mark.parametrize("backend", BACKENDS)
@BOTH_CALLS
def test_forward_equals_the_definition(backend, call):
    inputs = make_inputs([(4, 6), (3, 2), (1, 1)], head_dim=5, dtype=torch.float64)
    locations = inputs[2]
    locations[0, 0, 0, 0] = torch.tensor(
        [[0.0, 0.0], [1.0, 1.0], [0.5, 0.5], [1 / 12, 7 / 8]]
    )  # corners, a cell's centre
    locations[0, 1, 0, 0] = torch.tensor([[math.nan, 0.5], [0.5, math.inf], [-math.inf, 0.5], [1e30, -1e30]])
    torch.testing.assert_close(by(backend, call)(*inputs), attend_by_loops(*inputs), rtol=1e-12, atol=1e-12)


# Widths of every vector loop and its remainder; levels and points that do and don't fill a vector.
@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("head_dim", "levels", "points"),
    [(1, 1, 1), (5, 4, 4), (8, 2, 3), (16, 5, 4), (32, 4, 4), (43, 3, 1), (64, 4, 8), (72, 1, 5), (96, 2, 2)],
)
def test_cpp_equals_eager(head_dim, levels, points, dtype):
    inputs = make_inputs([(9, 11), (5, 6), (3, 3), (2, 1), (1, 1)][:levels], head_dim=head_dim, points=points)
    # The locations are given in the type that the operator computes in.
    inputs = change_floats(inputs, lambda x: x.to(torch.promote_types(dtype, torch.float32)))
    inputs[0] = inputs[0].to(dtype)
    grad_output = torch.randn(2, 7, 3 * head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    results = run(by("cpp"), inputs, grad_output)
    exact = run(ms_deform_attn_eager, change_floats(inputs, torch.Tensor.double), grad_output)
    tolerance = {torch.float32: 1e-5, torch.float64: 1e-12, torch.bfloat16: 1e-5}[dtype]
    for name, result, expected in zip(("output", "value", "locations", "weights"), results, exact):
        rounded = dtype == torch.bfloat16 and name in ("output", "value")  # sums are float32, then rounded once
        relative = 2**-8 if rounded else tolerance
        scale = expected.abs().max().item()
        assert result.dtype == (dtype if name in ("output", "value") else inputs[2].dtype)
        torch.testing.assert_close(result.double(), expected, rtol=relative, atol=tolerance * scale, msg=name)


def make_self_attention(shapes, spread, **sizes):
    """As many queries as tokens: half of the points lie ``spread`` cells about the query's place, half anywhere."""
    inputs = make_inputs(shapes, queries=sum(h * w for h, w in shapes), **sizes)
    locations = inputs[2]
    places = [torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(1) for h, w in shapes]
    generator = torch.Generator().manual_seed(2)
    offsets = torch.randn(locations.shape, generator=generator, dtype=torch.float64) * spread
    near = torch.cat(places)[:, None, None, None] + offsets / torch.tensor(shapes).flip(1)[:, None]
    locations[..., ::2, :] = near.to(locations.dtype)[..., ::2, :]
    return inputs


# Maps that are smaller and larger than a tile, and no multiple of it; maps that don't resemble each other.
@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64, torch.bfloat16], ids=str)
@pytest.mark.parametrize(
    ("shapes", "head_dim", "points"),
    [
        ([(37, 70), (19, 35), (10, 18), (5, 9)], 32, 4),
        ([(41, 23), (3, 50), (1, 1)], 5, 3),
        ([(1, 90), (90, 1), (0, 7)], 8, 4),
        ([(40, 33)], 64, 2),
        ([(3, 4), (2, 2)], 9, 70),
    ],
    ids=str,
)
def test_self_attention_equals_eager(shapes, head_dim, points, dtype):
    sizes = {"heads": 2, "head_dim": head_dim, "points": points}
    inputs = make_self_attention(shapes, 3, **sizes, dtype=torch.promote_types(dtype, torch.float32))
    inputs = (inputs[0].to(dtype), *inputs[1:])
    grad_output = torch.randn(2, inputs[2].shape[1], 2 * head_dim, generator=torch.Generator().manual_seed(1)).to(dtype)
    exact = run(ms_deform_attn_eager, change_floats(inputs, torch.Tensor.double), grad_output)
    tolerance = 1e-12 if dtype == torch.float64 else 1e-5
    threads = torch.get_num_threads()
    try:
        for count in (1, 2, 3):
            torch.set_num_threads(count)
            results = run(by("cpp"), inputs, grad_output)
            for name, result, expected in zip(("output", "value", "locations", "weights"), results, exact):
                relative = 2**-8 if dtype == torch.bfloat16 and name in ("output", "value") else tolerance
                scale = expected.abs().max().item()
                # Near the kinks at cell centres, rounding chooses the side: of a few points in a thousand, in float32.
                close = torch.isclose(result.double(), expected, rtol=relative, atol=tolerance * scale)
                assert close.double().mean() > (0.999 if name == "locations" else 1 - 1e-9), name
    finally:
        torch.set_num_threads(threads)


@needs_cpp
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_self_attention_reads_nothing_outside(dtype):
    """Bad locations in windows with and without the map's border, whatever stands in the feature map."""
    value, *others = make_self_attention([(70, 75), (35, 38)], 3, heads=1, points=4)
    value = torch.full_like(value, math.inf).to(dtype)
    bad = torch.tensor([math.nan, math.inf, -math.inf, -0.6, 1.6, 3e38, -7e9, 1e5]).repeat(others[1].shape[1] // 8 + 1)
    others[1][..., 1] = bad[: others[1].shape[1], None, None, None]
    for x in run(by("cpp"), (value, *others)):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_bfloat16_throughout(backend):
    """Locations and weights in bfloat16 are taken as the numbers they are; their gradients come in bfloat16."""
    inputs = make_inputs([(5, 7), (2, 3)], dtype=torch.bfloat16)
    results = run(by(backend), inputs)
    exact = run(ms_deform_attn_eager, change_floats(inputs, torch.Tensor.double))
    for result, expected in zip(results, exact):
        assert result.dtype == torch.bfloat16
        torch.testing.assert_close(result.double(), expected, rtol=2**-7, atol=1e-4 * expected.abs().max().item())


@pytest.mark.parametrize("backend", BACKENDS)
def test_gradients_equal_finite_differences(backend):
    value, shapes, locations, weights = make_inputs(
        [(3, 4), (2, 2)], batch=1, queries=3, heads=2, head_dim=3, points=2, dtype=torch.float64
    )
    leaves = [x.requires_grad_() for x in (value, locations, weights)]
    assert torch.autograd.gradcheck(lambda v, loc, w: OP(v, shapes, loc, w, backend), leaves)


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_opcheck(backend, dtype):
    """Schema, fake tensors, autograd registration, and tracing by the compiler with dynamic shapes."""
    inputs = make_inputs([(3, 4), (2, 2)], queries=5, dtype=dtype)
    torch.library.opcheck(OP, [*change_floats(inputs, torch.Tensor.requires_grad_), backend])


@pytest.mark.parametrize("backend", BACKENDS)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=str)
def test_locations_that_sample_nothing(backend, dtype):
    """Outside, infinite and NaN locations give zeros and zero gradients, whatever stands in the feature map."""
    value, shapes, locations, weights = make_inputs([(4, 5), (2, 3)], queries=9, dtype=dtype)
    value[:] = math.inf
    outside = [math.nan, math.inf, -math.inf, -0.6, 1.6, 3e38, -3e38, -7e9, 7e9]
    for query, bad in enumerate(outside):
        locations[:, query] = 0.5
        locations[:, query, ..., query % 2] = bad
    output, *grads = run(by(backend), (value, shapes, locations, weights))
    for x in (output, *grads):
        assert torch.equal(x, torch.zeros_like(x))


@pytest.mark.parametrize("backend", BACKENDS)
def test_non_contiguous_inputs(backend):
    inputs = make_inputs([(4, 5), (2, 3)])
    strided = change_floats(inputs, lambda x: x.repeat_interleave(2, 1)[:, ::2].mT.contiguous().mT)
    assert not any(x.is_contiguous() for x in (strided[0], *strided[2:]))
    grad_output = torch.randn(7, 2, 24).transpose(0, 1)
    for result, expected in zip(
        run(by(backend), strided, grad_output), run(by(backend), inputs, grad_output.contiguous())
    ):
        torch.testing.assert_close(result, expected)


@pytest.mark.parametrize("backend", BACKENDS)
@BOTH_CALLS
@pytest.mark.parametrize(
    "sizes",
    [
        {"queries": 0},
        {"batch": 0},
        {"points": 0},
        {"shapes": []},
        {"shapes": [(0, 0)]},
        {"shapes": [(3, 4), (0, 5), (2, 0), (1, 2)]},
    ],
    ids=str,
)
def test_empty_sizes(backend, call, sizes):
    inputs = make_inputs(**{"shapes": [(3, 4), (1, 2)], **sizes})
    results = run(by(backend, call), inputs)
    expected = run(ms_deform_attn_eager, inputs)
    assert results[0].shape == (inputs[0].shape[0], inputs[2].shape[1], 24)
    for x, y in zip(results, expected):
        torch.testing.assert_close(x, y)
    assert results[0].abs().sum() == 0 or len(sizes.get("shapes", [])) == 4


@needs_cpp
@pytest.mark.parametrize(
    "make",
    [
        lambda: make_inputs([(9, 11), (5, 6)], queries=100, heads=4, head_dim=32),
        lambda: make_self_attention([(50, 45), (25, 23)], 3, heads=4, head_dim=32),
        lambda: make_self_attention([(50, 70)], 3, heads=1, head_dim=32),
    ],
    ids=["any queries", "self-attention", "one map"],
)
def test_threads_change_no_bit(make):
    """Nothing is summed by two threads, however the work is split."""
    inputs = make()
    threads = torch.get_num_threads()
    try:
        for dtype in (torch.float32, torch.bfloat16):
            inputs = change_floats(inputs, lambda x, dtype=dtype: x.to(dtype))
            results = []
            for count in (1, 2, 3):  # four heads share out evenly over one and two threads, not over three
                torch.set_num_threads(count)
                results.append(run(by("cpp"), inputs))
            for others in results[1:]:
                assert all(torch.equal(x, y) for x, y in zip(results[0], others))
    finally:
        torch.set_num_threads(threads)


@needs_cpp
@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda x: x[0], r"value must be \[B, S, heads, D\]"),
        (0, lambda x: x[:, :-1], r"level 1 of size 2 x 3 does not fit the 25 tokens"),
        (0, lambda x: torch.cat([x, x], 1), r"spatial_shapes hold 26 tokens, value has 52"),
        (0, lambda x: x.half(), r"value must be float32, bfloat16 or float64"),
        (1, lambda x: [-size for size in x], r"level 0 has a negative size"),
        (1, lambda x: [size * 2**31 for size in x], r"level 0 of size .* does not fit"),
        (1, lambda x: x[:3], r"a height and a width for each level"),
        (1, lambda x: x[:2], r"sampling_locations must be \[2, Q, 3, 1, P, 2\]"),
        (2, lambda x: x[..., :1], r"sampling_locations must be \[2, Q, 3, 2, P, 2\]"),
        (2, lambda x: x[:1], r"sampling_locations must be \[2, Q, 3, 2, P, 2\]"),
        (2, lambda x: x.long(), r"must be floating point"),
        (3, lambda x: x[:, :2], r"attention_weights must be \[2, 7, 3, 2, 4\]"),
    ],
)
def test_sizes_that_do_not_fit(index, change, message):
    inputs = list(make_inputs([(4, 5), (2, 3)]))
    inputs[index] = change(inputs[index])
    with pytest.raises(RuntimeError, match=message):
        OP(*inputs, "cpp")


@pytest.mark.parametrize(
    ("index", "change", "message"),
    [
        (0, lambda x: x[0], r"value must be \[B, S, heads, D\]"),
        (0, lambda x: x[:, :-1], r"spatial_shapes \[4, 5, 2, 3\] hold 26 tokens, value has 25"),
        (0, lambda x: torch.cat([x, x], 1), r"hold 26 tokens, value has 52"),
        (1, lambda x: [-size for size in x], r"spatial_shapes \[-4, -5, -2, -3\]"),
        (1, lambda x: [*x, 7], r"spatial_shapes \[4, 5, 2, 3, 7\]"),
        (1, lambda x: [26, 1], r"sampling_locations must be floating point \[2, 7, 3, 1, 4, 2\]"),
        (1, lambda x: [*x, 0, 0], r"sampling_locations must be floating point \[2, 7, 3, 3, 4, 2\]"),
        (2, lambda x: x[0], r"sampling_locations must be floating point \[2, Q, 3, 2, P, 2\]"),
        (2, lambda x: x.long(), r"sampling_locations must be floating point .* got torch.int64"),
        (3, lambda x: x[:, :1], r"attention_weights must be floating point \[2, 7, 3, 2, 4\]"),
    ],
)
def test_eager_refuses_what_the_others_refuse(index, change, message):
    """Nothing is left out or broadcast in silence. The gradients are refused too."""
    inputs = list(make_inputs([(4, 5), (2, 3)]))
    inputs[index] = change(inputs[index])
    with pytest.raises(RuntimeError, match=message):
        OP(*inputs, "eager")
    with pytest.raises(RuntimeError, match=message):
        torch.ops.codetr_d2.ms_deform_attn_backward(torch.ones(2, 7, 24), *inputs, "eager")


def test_function_refuses_sizes_that_do_not_add_up():
    value, *others = make_inputs([(4, 5), (2, 3)])
    for backend in ("auto", "eager"):
        with pytest.raises(RuntimeError, match="tokens"):
            call_function(value[:, :-1], *others, backend)


def test_half_precision_takes_eager_on_the_cpu():
    value, *others = make_inputs([(4, 5), (2, 3)])
    result = call_function(value.half(), *others)
    assert result.dtype == torch.float16
    torch.testing.assert_close(result.float(), call_function(value, *others), rtol=1e-2, atol=1e-2)


def test_choice_of_backend():
    with pytest.raises(InputError, match="MODEL.MS_DEFORM_ATTN is 'fast': it must be one of auto, cpp, triton, eager"):
        check_backend("fast")
    assert active_backend("cpu", "eager") == ("eager", "asked for")
    assert active_backend("cuda", "eager")[0] == "eager"
    assert active_backend("mps") == ("eager", "there is no compiled kernel for mps")


CUDA = torch.device("cuda", 0)


@pytest.fixture
def dispatcher(monkeypatch):
    """The module, as a new process finds it: nothing is known of Triton yet, and nobody was warned."""
    module = importlib.import_module("codetr_d2.ops.ms_deform_attn.operator")
    monkeypatch.setattr(module, "_warned", set())
    module._triton_problem.cache_clear()
    yield module
    module._triton_problem.cache_clear()


@pytest.fixture
def gpu(monkeypatch):
    """A GPU that is only told of, and kernels for it: change ``capability`` and ``probe`` at will."""
    fake = SimpleNamespace(capability=(9, 0), probe=lambda device: None)
    fake.kernels = SimpleNamespace(
        INTERPRETED=False,
        TRITON_DTYPES=(torch.float32, torch.float16, torch.bfloat16),
        probe=lambda device: fake.probe(device),
    )
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: fake.capability)
    monkeypatch.setitem(sys.modules, "codetr_d2.ops.ms_deform_attn.triton_kernels", fake.kernels)
    return fake


def test_auto_takes_triton_on_a_gpu(dispatcher, gpu):
    assert active_backend(CUDA)[0] == "triton"
    with warnings.catch_warnings():
        warnings.simplefilter("error")  # float64 is no reason to warn
        for dtype, backend in [
            (torch.float32, "triton"),
            (torch.float16, "triton"),
            (torch.bfloat16, "triton"),
            (torch.float64, "eager"),
        ]:
            assert dispatcher._backend_of(SimpleNamespace(device=CUDA, dtype=dtype), "auto") == backend
    double, single = (SimpleNamespace(device=CUDA, dtype=dtype) for dtype in (torch.float64, torch.float32))
    assert dispatcher._backend_of(double, "triton") == "triton"  # which refuses it
    assert dispatcher._backend_of(single, "eager") == "eager"
    with pytest.raises(InputError, match="runs on the CPU; on cuda, take 'auto'"):
        active_backend(CUDA, "cpp")


def raise_no_compiler(device):
    raise RuntimeError("Failed to find C compiler.\nMore lines")


@pytest.mark.parametrize(
    ("change", "reason"),
    [
        ({"capability": (6, 1)}, "Triton needs a GPU of compute capability 7.0, and this one has 6.1"),
        ({"probe": raise_no_compiler}, "Triton can't run a kernel (Failed to find C compiler.)"),
        ({"kernels": None}, "Triton can't be imported"),
        ({"is_available": False}, "PyTorch finds no GPU"),
    ],
    ids=lambda x: next(iter(x)) if isinstance(x, dict) else "",
)
def test_gpu_without_triton(dispatcher, gpu, monkeypatch, change, reason):
    """auto goes on with eager and says why, once; triton is refused."""
    for name, value in change.items():
        setattr(gpu, name, value)
    if gpu.kernels is None:  # this is how Python remembers that a module is not to be had
        monkeypatch.setitem(sys.modules, "codetr_d2.ops.ms_deform_attn.triton_kernels", None)
    if "is_available" in change:
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    name, why = active_backend(CUDA)
    assert name == "eager" and reason in why
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(2):
            assert dispatcher._backend_of(SimpleNamespace(device=CUDA, dtype=torch.float32), "auto") == "eager"
    assert len(caught) == 1 and reason in str(caught[0].message)
    with pytest.raises(InputError, match="MODEL.MS_DEFORM_ATTN is 'triton', but .*take 'auto'"):
        check_backend("triton")
        active_backend(CUDA, "triton")


def test_triton_is_refused_on_the_cpu(dispatcher, gpu):
    for call in (OP, call_function):
        with pytest.raises(InputError, match="is 'triton', but Triton needs a GPU, .* on the CPU; take 'auto'"):
            call(*make_inputs([(2, 2)]), "triton")
    gpu.kernels.INTERPRETED = True
    dispatcher._triton_problem.cache_clear()
    assert active_backend("cpu", "triton")[0] == "triton"
    assert active_backend("cpu")[0] != "triton"  # the interpreter is never fast


@needs_cpp
def test_cpp_is_the_choice_of_auto():
    name, why = active_backend("cpu")
    assert name == "cpp" and "kernels" in why
    with pytest.raises(InputError, match="runs on the CPU; on cuda, take 'auto'"):
        active_backend("cuda", "cpp")


@pytest.mark.slow
@needs_cpp
@pytest.mark.parametrize("capability", ["avx2", "default"])
def test_kernels_of_older_processors(capability, tmp_path):
    """The tests above use the processor's best instruction set; the others agree with it."""
    script = """
import torch
from codetr_d2.ops import active_backend
results = []
for inputs in torch.load("inputs.pt", weights_only=True):
    leaves = [x.requires_grad_() for x in inputs if isinstance(x, torch.Tensor)]
    output = torch.ops.codetr_d2.ms_deform_attn(*inputs)
    output.sum().backward()
    results.append([output.detach(), *(x.grad for x in leaves)])
torch.save((active_backend("cpu"), results), "results.pt")
"""
    cases = []
    for head_dim in (5, 8, 32, 72):
        for dtype in (torch.float32, torch.float64, torch.bfloat16):
            for make in (make_inputs, functools.partial(make_self_attention, spread=2)):
                value, *others = make([(9, 11), (5, 6), (1, 1)], head_dim=head_dim)
                cases.append([value.to(dtype), *others])
    torch.save(cases, tmp_path / "inputs.pt")
    run_copy(tmp_path, script, library=True, ATEN_CPU_CAPABILITY=capability)
    (name, why), results = torch.load(tmp_path / "results.pt", weights_only=True)
    assert name == "cpp" and ({"avx2": "AVX2", "default": "baseline"}[capability] in why or "baseline" in why)
    for inputs, result in zip(cases, results):
        for index, (x, y) in enumerate(zip(result, run(by("cpp"), inputs))):
            low = inputs[0].dtype == torch.bfloat16 and index < 2
            torch.testing.assert_close(x, y, rtol=2**-7 if low else 1e-5, atol=1e-4 * y.abs().max().item())


@pytest.mark.slow
def test_without_the_library(tmp_path):
    """A package without the compiled library computes the same, warns once and names the command that builds it."""
    script = """
import warnings, torch
from codetr_d2.errors import InputError
from codetr_d2.ops import active_backend, check_backend, ms_deform_attn
inputs = torch.load("inputs.pt", weights_only=True)
pairs = [inputs[0], list(zip(inputs[1][::2], inputs[1][1::2])), *inputs[2:]]
with warnings.catch_warnings(record=True) as caught:
    warnings.simplefilter("always")
    outputs = [torch.ops.codetr_d2.ms_deform_attn(*inputs), ms_deform_attn(*pairs)] + [ms_deform_attn(*pairs)]
caught = [str(x.message) for x in caught if "Deformable attention" in str(x.message)]
assert len(caught) == 1 and "pip install --no-build-isolation --no-deps -e ." in caught[0], caught
name, why = active_backend("cpu")
assert name == "eager" and "not built" in why and "pip install" in why, why
try:
    check_backend("cpp")
except InputError as error:
    assert "not built" in str(error) and "pip install" in str(error), error
else:
    raise AssertionError("cpp was accepted")
torch.save(outputs, "outputs.pt")
"""
    inputs = make_inputs([(4, 5), (2, 3)])
    torch.save(inputs, tmp_path / "inputs.pt")
    run_copy(tmp_path, script, library=False)
    for output in torch.load(tmp_path / "outputs.pt", weights_only=True):
        torch.testing.assert_close(output, OP(*inputs))


@pytest.mark.slow
def test_library_that_does_not_load(tmp_path):
    """A library built against another PyTorch, or a broken one, is no error but a reason."""
    script = """
from pathlib import Path
Path("codetr_d2/_C.so").write_bytes(b"not a library")
from codetr_d2.ops import active_backend
name, why = active_backend("cpu")
assert name == "eager" and "can't be loaded" in why and "pip install" in why, why
"""
    run_copy(tmp_path, script, library=False)


@pytest.mark.skipif(not torch.cuda.is_available(), reason="no GPU")
@pytest.mark.parametrize("backend", ["triton", "eager"])
@BOTH_CALLS
@pytest.mark.parametrize(("head_dim", "dtype"), [(32, "float32"), (5, "float32"), (32, "float16"), (64, "bfloat16")])
def test_cuda_equals_cpu(backend, call, head_dim, dtype):
    value, *others = make_inputs([(9, 11), (5, 6)], head_dim=head_dim, queries=70)
    inputs = [value.to(getattr(torch, dtype)), *others]
    on_gpu = change_floats(inputs, torch.Tensor.cuda)
    tolerance = 1e-4 if dtype == "float32" else 2**-7
    for result, expected in zip(run(by(backend, call), on_gpu), run(ms_deform_attn_eager, inputs)):
        torch.testing.assert_close(result.cpu(), expected, rtol=tolerance, atol=1e-4 * expected.abs().max().item())
