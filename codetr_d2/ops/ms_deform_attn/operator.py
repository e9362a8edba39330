"""The operator ``torch.ops.codetr_d2.ms_deform_attn``, and the choice of the backend that computes it."""

import functools
import importlib
import warnings
from collections.abc import Sequence

import torch
from torch import Tensor

from ...errors import InputError
from ..library import library_is_loaded, library_problem
from .eager import ms_deform_attn_eager, ms_deform_attn_eager_backward

__all__ = ["active_backend", "check_backend", "ms_deform_attn"]

BACKENDS = ("auto", "cpp", "triton", "eager")
CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
MIN_CAPABILITY = (7, 0)  # of NVIDIA's GPUs, for Triton: what torch.compile asks too

_warned = set()  # types of devices


def _triton_kernels():
    return importlib.import_module(".triton_kernels", __package__)


@functools.cache
def _triton_problem(device: torch.device | None) -> str:
    """Why Triton can't compute on ``device``, "" if it can. None asks only whether it can be imported."""
    try:
        kernels = _triton_kernels()
    except Exception as error:  # not installed, or an installation that is broken in any way
        return f"Triton can't be imported ({error})"
    if device is None:
        return ""
    if device.type == "cpu":
        return "" if kernels.INTERPRETED else "Triton needs a GPU, and the tensors are on the CPU"
    if device.type != "cuda":
        return f"there is no Triton kernel for {device.type}"
    if not torch.cuda.is_available():
        return "PyTorch finds no GPU"
    capability = torch.cuda.get_device_capability(device)
    if torch.version.hip is None and capability < MIN_CAPABILITY:
        needed, got = ("{}.{}".format(*x) for x in (MIN_CAPABILITY, capability))
        return f"Triton needs a GPU of compute capability {needed}, and this one has {got}"
    try:
        kernels.probe(device)
    except Exception as error:  # Triton needs a C compiler, a driver that is new enough, a folder for its cache
        return f"Triton can't run a kernel ({(str(error).strip() or type(error).__name__).splitlines()[0]})"
    return ""


def check_backend(backend: str) -> None:
    """Check the name of a backend before anything is computed.

    Args:
        backend: ``auto``, the fastest backend that works where the tensors are; ``cpp``, the compiled kernels for the
            CPU; ``triton``, the kernels for GPUs; ``eager``, plain PyTorch, which works anywhere.

    Raises:
        InputError: unknown name, ``cpp`` without the compiled library, or ``triton`` where Triton can't be imported.
    """
    if backend not in BACKENDS:
        raise InputError(f"MODEL.MS_DEFORM_ATTN is {backend!r}: it must be one of {', '.join(BACKENDS)}.")
    if backend == "cpp" and not library_is_loaded():
        raise InputError(f"MODEL.MS_DEFORM_ATTN is 'cpp', but {library_problem()} (or take 'auto').")
    if backend == "triton" and _triton_problem(None):
        raise InputError(f"MODEL.MS_DEFORM_ATTN is 'triton', but {_triton_problem(None)}: install it, or take 'auto'.")


def active_backend(device: torch.device | str, backend: str = "auto") -> tuple[str, str]:
    """The backend that computes deformable attention for tensors on ``device``, and why it is the one.

    ``auto`` takes eager, whatever this says, for dtypes that the other backend does not know.

    Returns:
        ``cpp``, ``triton`` or ``eager``, and a phrase for people.

    Raises:
        InputError: ``cpp`` or ``triton`` was asked for, and does not run on the device.
    """
    device = torch.device(device)
    if backend == "eager":
        return "eager", "asked for"
    if backend == "cpp" and device.type != "cpu":
        raise InputError(f"MODEL.MS_DEFORM_ATTN is 'cpp', which runs on the CPU; on {device.type}, take 'auto'.")
    if backend == "triton" or (backend == "auto" and device.type == "cuda"):
        problem = _triton_problem(device)
        if problem and backend == "triton":
            raise InputError(f"MODEL.MS_DEFORM_ATTN is 'triton', but {problem}; take 'auto'.")
        return ("eager", problem) if problem else ("triton", "kernels compiled by Triton for the GPU")
    if device.type != "cpu":
        return "eager", f"there is no compiled kernel for {device.type}"
    if not library_is_loaded():
        return "eager", library_problem()
    return "cpp", f"compiled library, {torch.ops.codetr_d2._ms_deform_attn_cpp_instruction_set()} kernels"


def _backend_of(value: Tensor, backend: str) -> str:
    """The backend that computes this call. Warns, the first time that the fast one for a device is missed."""
    name, why = active_backend(value.device, backend)
    if backend != "auto":
        return name
    kind = value.device.type
    if name == "eager":
        if kind in ("cpu", "cuda") and kind not in _warned:
            _warned.add(kind)
            warnings.warn(f"Deformable attention runs in plain PyTorch, which is slow: {why}", stacklevel=3)
        return name
    dtypes = CPP_DTYPES if name == "cpp" else _triton_kernels().TRITON_DTYPES
    return name if value.dtype in dtypes else "eager"


# Written out: older versions of torch cannot infer it from these annotations.
_ARGUMENTS = (
    "Tensor value, SymInt[] spatial_shapes, Tensor sampling_locations, Tensor attention_weights, str backend='auto'"
)


_OPERATOR = "codetr_d2::ms_deform_attn"


@torch.compiler.disable  # as torch.library.custom_op does: a kernel is called, not traced
def _ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    backend: str = "auto",
) -> Tensor:
    inputs = (value, spatial_shapes, sampling_locations, attention_weights)
    name = _backend_of(value, backend)
    if name == "cpp":
        return torch.ops.codetr_d2._ms_deform_attn_cpp(*inputs)
    return _triton_kernels().ms_deform_attn_triton(*inputs) if name == "triton" else ms_deform_attn_eager(*inputs)


if library_is_loaded():  # it defines the operator, for programs without Python; its own kernel comes after these
    torch.library.impl(_OPERATOR, ("cpu", "cuda"), _ms_deform_attn)
else:
    torch.library.define(_OPERATOR, f"({_ARGUMENTS}) -> Tensor", tags=torch.Tag.pt2_compliant_tag)
    torch.library.impl(_OPERATOR, "default", _ms_deform_attn)


@torch.library.custom_op(
    "codetr_d2::ms_deform_attn_backward",
    mutates_args=(),
    schema=f"(Tensor grad_output, {_ARGUMENTS}) -> (Tensor, Tensor, Tensor)",
)
def _ms_deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    backend: str = "auto",
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``value``, ``sampling_locations`` and ``attention_weights``."""
    inputs = (grad_output, value, spatial_shapes, sampling_locations, attention_weights)
    name = _backend_of(value, backend)
    if name == "cpp":
        return torch.ops.codetr_d2._ms_deform_attn_cpp_backward(*inputs)
    if name == "triton":
        return _triton_kernels().ms_deform_attn_triton_backward(*inputs)
    return ms_deform_attn_eager_backward(*inputs)


@torch.library.register_fake(_OPERATOR)
def _(value, spatial_shapes, sampling_locations, attention_weights, backend="auto"):
    batch, _, num_heads, head_dim = value.shape
    return value.new_empty((batch, sampling_locations.shape[1], num_heads * head_dim))


@_ms_deform_attn_backward.register_fake
def _(grad_output, value, spatial_shapes, sampling_locations, attention_weights, backend="auto"):
    return tuple(x.new_empty(x.shape) for x in (value, sampling_locations, attention_weights))


def _setup_context(ctx, inputs, output):
    value, ctx.spatial_shapes, sampling_locations, attention_weights, ctx.backend = inputs
    ctx.save_for_backward(value, sampling_locations, attention_weights)


def _backward(ctx, grad_output):
    value, *others = ctx.saved_tensors
    grad_value, grad_locations, grad_weights = torch.ops.codetr_d2.ms_deform_attn_backward(
        grad_output, value, ctx.spatial_shapes, *others, ctx.backend
    )
    return grad_value, None, grad_locations, grad_weights, None


torch.library.register_autograd(_OPERATOR, _backward, setup_context=_setup_context)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Sequence[tuple[int, int]],
    sampling_locations: Tensor,
    attention_weights: Tensor,
    backend: str = "auto",
) -> Tensor:
    """Multi-scale deformable attention: every query and head sums a few bilinear samples of the feature maps.

    A location (x, y) samples level l, of width W and height H, at the pixel coordinates x * W - 0.5, y * H - 0.5: 0
    and 1 are the outer edges of the map. What lies outside counts as zero, and so does a location that is not finite.
    Source: Deformable DETR (Zhu et al., ICLR 2021), equation 3, without its two projections.

    This is the operator ``torch.ops.codetr_d2.ms_deform_attn``, which takes the sizes of the levels as one flat list,
    except that the backend ``eager`` runs the plain PyTorch code itself, whose autograd needs no second forward pass.
    torch.compile and torch.export get the operator, unless ``eager`` was asked for.

    Args:
        value: [B, S, heads, D] features of all levels, float. The result has its dtype; sums are float32 at least.
        spatial_shapes: (height, width) of each of the L levels, as numbers: the levels follow each other, and their
            products add up to S.
        sampling_locations: [B, Q, heads, L, P, 2] (x, y), normalised. Below float32 they are too coarse for big maps.
        attention_weights: [B, Q, heads, L, P].
        backend: see :func:`check_backend`.

    Returns:
        [B, Q, heads * D].

    Raises:
        RuntimeError: sizes, dtypes or devices that don't fit each other.
        InputError: the backend that was chosen does not run where the tensors are.
    """
    inputs = (value, [size for shape in spatial_shapes for size in shape], sampling_locations, attention_weights)
    # No function that warns or raises is traced: the operator asks when it runs.
    if (torch.compiler.is_compiling() and backend != "eager") or _backend_of(value, backend) != "eager":
        return torch.ops.codetr_d2.ms_deform_attn(*inputs, backend)
    return ms_deform_attn_eager(*inputs)
