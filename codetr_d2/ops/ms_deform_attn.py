"""The operator ``torch.ops.codetr_d2.ms_deform_attn``, and the choice of the backend that computes it."""

import functools
import importlib
import sys
import warnings
from pathlib import Path

import torch
from torch import Tensor

from ..errors import InputError
from .eager import ms_deform_attn_eager, ms_deform_attn_eager_backward

__all__ = ["active_backend", "ms_deform_attn", "set_backend"]

BACKENDS = ("auto", "cpp", "triton", "eager")
CPP_DTYPES = (torch.float32, torch.bfloat16, torch.float64)
MIN_CAPABILITY = (7, 0)  # of NVIDIA's GPUs, for Triton: what torch.compile asks too
BUILD_COMMAND = f"{sys.executable} -m pip install --no-build-isolation --no-deps -e ."


def _load_library() -> str:
    """Load the compiled library that ``setup.py`` builds. Returns why it can't be used, "" if it can."""
    libraries = sorted(Path(__file__).parents[1].glob("_C.*"))
    if not libraries:
        return "its C++ library is not built"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:  # built against another PyTorch, or for another machine
        return f"its C++ library can't be loaded ({error})"
    if not hasattr(torch.ops.codetr_d2, "_nms_cpp"):
        return "its C++ library was built from older sources"
    return ""


_library_problem = _load_library()
_chosen = "auto"
_warned = set()  # types of devices


def library_is_loaded() -> bool:
    """Whether the compiled library is there."""
    return not _library_problem


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


def _mend() -> str:
    return f"{_library_problem}; with a C++ compiler, this command in the project's folder builds it: {BUILD_COMMAND}"


def set_backend(name: str) -> None:
    """Choose what computes deformable attention from now on, in this process.

    Args:
        name: ``auto``, the fastest backend that works where the tensors are; ``cpp``, the compiled kernels for the CPU;
            ``triton``, the kernels for GPUs; ``eager``, plain PyTorch, which works anywhere.

    Raises:
        InputError: unknown name, ``cpp`` without the compiled library, or ``triton`` where Triton can't be imported.
    """
    global _chosen
    if name not in BACKENDS:
        raise InputError(f"MODEL.MS_DEFORM_ATTN is {name!r}: it must be one of {', '.join(BACKENDS)}.")
    if name == "cpp" and _library_problem:
        raise InputError(f"MODEL.MS_DEFORM_ATTN is 'cpp', but {_mend()} (or take 'auto').")
    if name == "triton" and _triton_problem(None):
        raise InputError(f"MODEL.MS_DEFORM_ATTN is 'triton', but {_triton_problem(None)}: install it, or take 'auto'.")
    _chosen = name


def active_backend(device: torch.device | str) -> tuple[str, str]:
    """The backend that computes deformable attention for tensors on ``device``, and why it is the one.

    ``auto`` takes eager, whatever this says, for dtypes that the other backend does not know.

    Returns:
        ``cpp``, ``triton`` or ``eager``, and a phrase for people.

    Raises:
        InputError: ``cpp`` or ``triton`` was asked for, and does not run on the device.
    """
    device = torch.device(device)
    if _chosen == "eager":
        return "eager", "asked for"
    if _chosen == "cpp" and device.type != "cpu":
        raise InputError(f"MODEL.MS_DEFORM_ATTN is 'cpp', which runs on the CPU; on {device.type}, take 'auto'.")
    if _chosen == "triton" or (_chosen == "auto" and device.type == "cuda"):
        problem = _triton_problem(device)
        if problem and _chosen == "triton":
            raise InputError(f"MODEL.MS_DEFORM_ATTN is 'triton', but {problem}; take 'auto'.")
        return ("eager", problem) if problem else ("triton", "kernels compiled by Triton for the GPU")
    if device.type != "cpu":
        return "eager", f"there is no compiled kernel for {device.type}"
    if _library_problem:
        return "eager", _mend()
    return "cpp", f"compiled library, {torch.ops.codetr_d2._ms_deform_attn_cpp_instruction_set()} kernels"


def _backend_of(value: Tensor) -> str:
    """The backend that computes this call. Warns, the first time that the fast one for a device is missed."""
    backend, why = active_backend(value.device)
    if _chosen != "auto":
        return backend
    kind = value.device.type
    if backend == "eager":
        if kind in ("cpu", "cuda") and kind not in _warned:
            _warned.add(kind)
            warnings.warn(f"Deformable attention runs in plain PyTorch, which is slow: {why}", stacklevel=3)
        return backend
    dtypes = CPP_DTYPES if backend == "cpp" else _triton_kernels().TRITON_DTYPES
    return backend if value.dtype in dtypes else "eager"


@torch.library.custom_op("codetr_d2::ms_deform_attn", mutates_args=())
def _ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    backend = _backend_of(value)
    if backend == "cpp":
        return torch.ops.codetr_d2._ms_deform_attn_cpp(*inputs)
    return _triton_kernels().ms_deform_attn_triton(*inputs) if backend == "triton" else ms_deform_attn_eager(*inputs)


@torch.library.custom_op("codetr_d2::ms_deform_attn_backward", mutates_args=())
def _ms_deform_attn_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of ``value``, ``sampling_locations`` and ``attention_weights``."""
    inputs = (grad_output, value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    backend = _backend_of(value)
    if backend == "cpp":
        return torch.ops.codetr_d2._ms_deform_attn_cpp_backward(*inputs)
    if backend == "triton":
        return _triton_kernels().ms_deform_attn_triton_backward(*inputs)
    return ms_deform_attn_eager_backward(*inputs)


@_ms_deform_attn.register_fake
def _(value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    batch, _, num_heads, head_dim = value.shape
    return value.new_empty((batch, sampling_locations.shape[1], num_heads * head_dim))


@_ms_deform_attn_backward.register_fake
def _(grad_output, value, spatial_shapes, level_start_index, sampling_locations, attention_weights):
    return tuple(x.new_empty(x.shape) for x in (value, sampling_locations, attention_weights))


def _setup_context(ctx, inputs, output):
    ctx.save_for_backward(*inputs)


def _backward(ctx, grad_output):
    grad_value, grad_locations, grad_weights = torch.ops.codetr_d2.ms_deform_attn_backward(
        grad_output, *ctx.saved_tensors
    )
    return grad_value, None, None, grad_locations, grad_weights


_ms_deform_attn.register_autograd(_backward, setup_context=_setup_context)


def ms_deform_attn(
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention: every query and head sums a few bilinear samples of the feature maps.

    A location (x, y) samples level l, of width W and height H, at the pixel coordinates x * W - 0.5, y * H - 0.5: 0
    and 1 are the outer edges of the map. What lies outside counts as zero, and so does a location that is not finite.
    Source: Deformable DETR (Zhu et al., ICLR 2021), equation 3, without its two projections.

    This is the operator ``torch.ops.codetr_d2.ms_deform_attn``, except that the backend ``eager`` runs the plain
    PyTorch code itself, whose autograd needs no second forward pass. torch.compile and torch.export get the operator,
    unless ``eager`` was asked for.

    Args:
        value: [B, S, heads, D] features of all levels, float. The result has its dtype; sums are float32 at least.
        spatial_shapes: [L, 2] int64 (height, width) of each level; their products add up to S.
        level_start_index: [L] int64, the index of each level's first token in S: the levels follow each other.
        sampling_locations: [B, Q, heads, L, P, 2] (x, y), normalised. Below float32 they are too coarse for big maps.
        attention_weights: [B, Q, heads, L, P].

    Returns:
        [B, Q, heads * D].

    Raises:
        RuntimeError: sizes, dtypes or devices that don't fit each other.
        InputError: the backend that was chosen does not run where the tensors are.
    """
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    # No function that warns or raises is traced: the operator asks when it runs.
    if (torch.compiler.is_compiling() and _chosen != "eager") or _backend_of(value) != "eager":
        return torch.ops.codetr_d2.ms_deform_attn(*inputs)
    return ms_deform_attn_eager(*inputs)
