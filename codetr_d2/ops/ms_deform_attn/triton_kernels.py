"""Deformable attention in Triton, for GPUs. Imported only where it is used: Triton comes with PyTorch on some systems.

With ``TRITON_INTERPRET=1`` in the environment before Triton is first imported, the same kernels run in Triton's
interpreter, on tensors of the CPU: slowly, for tests.

One program computes a block of queries of one image and head. Its tiles are [queries, channels], of a size that the
head's width alone decides. Sums are float32, whatever the tensors are.
"""

import functools
import os
import warnings
from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from .checks import check_inputs

__all__ = ["INTERPRETED", "TRITON_DTYPES", "ms_deform_attn_triton", "ms_deform_attn_triton_backward", "probe"]

INTERPRETED = os.environ.get("TRITON_INTERPRET") == "1"
TRITON_DTYPES = (torch.float32, torch.float16, torch.bfloat16)

TILE = 512  # elements of a tile: 16 bytes of float32 for each thread of four warps
MAX_WARPS = 8


# The sizes of images change from batch to batch: kernels that Triton specialises on them would be compiled again.
_jit = triton.jit(do_not_specialize=["num_queries", "num_tokens"])


@triton.jit
def _locate(locations, point, valid, height, width):
    """The cell that each location [queries] falls into, between four neighbours.

    Returns:
        Row and column of the upper left neighbour, the fractions of the way to the lower right one, and whether any
        of the four can lie in the map.
    """
    x = tl.load(locations + 2 * point, mask=valid, other=0.0).to(tl.float32) * width - 0.5
    y = tl.load(locations + 2 * point + 1, mask=valid, other=0.0).to(tl.float32) * height - 0.5
    # False for NaN too. Only numbers that fit an integer are converted to one.
    valid = valid & (x >= -1) & (x < width) & (y >= -1) & (y < height)
    x, y = tl.where(valid, x, 0.0), tl.where(valid, y, 0.0)
    column, row = tl.floor(x), tl.floor(y)
    return row.to(tl.int32), column.to(tl.int32), y - row, x - column, valid


@triton.jit
def _tap(row, column, valid, height, width, first, num_tokens):
    """The token at (row, column) of a level that starts at ``first``, and whether there is one.

    The last two comparisons always hold, as the sizes of the levels are checked: nothing outside ``value`` is touched.
    """
    token = first + row * width + column
    valid = valid & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return token.to(tl.int64), valid & (token >= 0) & (token < num_tokens)


@_jit
def _forward_kernel(
    value,  # [B, S, heads, D]
    levels,  # [L, 3] (height, width, first token)
    locations,  # [B, Q, heads, L, P, 2]
    weights,  # [B, Q, heads, L, P]
    output,  # [B, Q, heads, D]
    num_queries,
    num_tokens,
    num_heads,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(num_queries, BLOCK_Q)
    program = tl.program_id(0)
    query = program % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head = program // blocks % num_heads
    image = (program // blocks // num_heads).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    in_query, in_width = query < num_queries, (channel < WIDTH)[None, :]
    item = (image * num_queries + query) * num_heads + head
    value += (image * num_tokens * num_heads + head) * WIDTH

    total = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
    for level in range(LEVELS):
        height = tl.load(levels + 3 * level)
        width = tl.load(levels + 3 * level + 1)
        first = tl.load(levels + 3 * level + 2)
        for index in range(POINTS):
            point = (item * LEVELS + level) * POINTS + index
            weight = tl.load(weights + point, mask=in_query, other=0.0).to(tl.float32)
            row, column, down, right, valid = _locate(locations, point, in_query, height, width)
            sampled = tl.zeros([BLOCK_Q, BLOCK_D], tl.float32)
            for corner in tl.static_range(4):
                # 1 - fraction for the neighbours above and on the left, the fraction for the others.
                share = tl.abs(1 - corner // 2 - down) * tl.abs(1 - corner % 2 - right)
                token, there = _tap(row + corner // 2, column + corner % 2, valid, height, width, first, num_tokens)
                offset = (token * num_heads * WIDTH)[:, None] + channel[None, :]
                tap = tl.load(value + offset, mask=there[:, None] & in_width, other=0.0)
                sampled += share[:, None] * tap.to(tl.float32)
            total += weight[:, None] * sampled
    tl.store(output + (item * WIDTH)[:, None] + channel[None, :], total, mask=in_query[:, None] & in_width)


@_jit
def _backward_kernel(
    grad_output,  # [B, Q, heads, D]
    value,
    levels,
    locations,
    weights,
    grad_value,  # [B, S, heads, D] float32, zeros: what several programs add to
    grad_locations,  # [B, Q, heads, L, P, 2], written
    grad_weights,  # [B, Q, heads, L, P], written
    num_queries,
    num_tokens,
    num_heads,
    LEVELS: tl.constexpr,
    POINTS: tl.constexpr,
    WIDTH: tl.constexpr,
    BLOCK_Q: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    blocks = tl.cdiv(num_queries, BLOCK_Q)
    program = tl.program_id(0)
    query = program % blocks * BLOCK_Q + tl.arange(0, BLOCK_Q)
    head = program // blocks % num_heads
    image = (program // blocks // num_heads).to(tl.int64)
    channel = tl.arange(0, BLOCK_D)
    in_query, in_width = query < num_queries, (channel < WIDTH)[None, :]
    item = (image * num_queries + query) * num_heads + head
    start = (image * num_tokens * num_heads + head) * WIDTH
    value += start
    grad_value += start

    offset = (item * WIDTH)[:, None] + channel[None, :]
    grad = tl.load(grad_output + offset, mask=in_query[:, None] & in_width, other=0.0).to(tl.float32)
    for level in range(LEVELS):
        height = tl.load(levels + 3 * level)
        width = tl.load(levels + 3 * level + 1)
        first = tl.load(levels + 3 * level + 2)
        for index in range(POINTS):
            point = (item * LEVELS + level) * POINTS + index
            weight = tl.load(weights + point, mask=in_query, other=0.0).to(tl.float32)
            row, column, down, right, valid = _locate(locations, point, in_query, height, width)
            grad_x = tl.zeros([BLOCK_Q], tl.float32)
            grad_y = tl.zeros([BLOCK_Q], tl.float32)
            grad_weight = tl.zeros([BLOCK_Q], tl.float32)
            for corner in tl.static_range(4):
                share_y, share_x = tl.abs(1 - corner // 2 - down), tl.abs(1 - corner % 2 - right)
                share = share_y * share_x
                token, there = _tap(row + corner // 2, column + corner % 2, valid, height, width, first, num_tokens)
                offset = (token * num_heads * WIDTH)[:, None] + channel[None, :]
                mask = there[:, None] & in_width
                product = tl.sum(grad * tl.load(value + offset, mask=mask, other=0.0).to(tl.float32), 1)
                grad_weight += product * share
                grad_x += product * share_y * (corner % 2 * 2 - 1)  # the share grows or falls with x by this
                grad_y += product * share_x * (corner // 2 * 2 - 1)
                tl.atomic_add(grad_value + offset, grad * (weight * share)[:, None], mask=mask, sem="relaxed")
            tl.store(grad_weights + point, grad_weight, mask=in_query)
            tl.store(grad_locations + 2 * point, grad_x * weight * width, mask=in_query)
            tl.store(grad_locations + 2 * point + 1, grad_y * weight * height, mask=in_query)


def _check(value: Tensor, *others: Sequence[int] | Tensor) -> None:
    """Refuse what does not fit, and what the kernels don't know."""
    check_inputs(value, *others)
    if value.dtype not in TRITON_DTYPES:
        raise RuntimeError(f"ms_deform_attn: value must be float32, float16 or bfloat16 for Triton, got {value.dtype}")


@functools.lru_cache(maxsize=64)
def _level_table(spatial_shapes: tuple[int, ...], device: torch.device) -> Tensor:
    """[L, 3] int32 (height, width, first token) of each level, on ``device``: the last few are kept.

    Copying the numbers anew for every call would take longer than many a kernel. No autograd graph ever holds the
    table, so one that was made in inference mode serves training too.
    """
    rows, first = [], 0
    for height, width in zip(spatial_shapes[::2], spatial_shapes[1::2]):
        rows.append((height, width, first))
        first += height * width
    return torch.tensor(rows, dtype=torch.int32, device=device).reshape(-1, 3)


def _launch(kernel, tensors: tuple[Tensor, ...], value: Tensor, locations: Tensor) -> None:
    """Run ``kernel`` on contiguous tensors, on the device and the stream of ``value``."""
    batch, num_tokens, heads, width = value.shape
    _, queries, _, levels, points, _ = locations.shape
    block_d = triton.next_power_of_2(width)
    block_q = max(1, TILE // block_d)
    warps = min(MAX_WARPS, block_q * block_d // 128)
    grid = (triton.cdiv(queries, block_q) * heads * batch,)
    with torch.cuda.device_of(value):  # Triton launches on the current device; no change for the CPU
        kernel[grid](*tensors, queries, num_tokens, heads, levels, points, width, block_q, block_d, num_warps=warps)


def ms_deform_attn_triton(
    value: Tensor, spatial_shapes: Sequence[int], sampling_locations: Tensor, attention_weights: Tensor
) -> Tensor:
    """Multi-scale deformable attention on the GPU. Not differentiable by itself: the operator is.

    Arguments and result are those of the operator, tensors in any strides. Nothing waits for the
    GPU, but for the first call with sizes that are new to :func:`_level_table`.

    Raises:
        RuntimeError: sizes, dtypes or devices that don't fit each other; a value that is not of ``TRITON_DTYPES``.
    """
    _check(value, spatial_shapes, sampling_locations, attention_weights)
    batch, _, heads, width = value.shape
    sizes = (batch, sampling_locations.shape[1], heads * width)
    if not value.numel() or not attention_weights.numel():
        return value.new_zeros(sizes)
    output = value.new_empty(sizes)
    levels = _level_table(tuple(spatial_shapes), value.device)
    tensors = (value.contiguous(), levels, sampling_locations.contiguous(), attention_weights.contiguous(), output)
    _launch(_forward_kernel, tensors, value, sampling_locations)
    return output


def ms_deform_attn_triton_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, given that of the output [B, Q, heads * D].

    Queries that sample the same token add to its gradient atomically, in float32 and in any order: on a GPU, the last
    bits of the gradient of ``value`` differ from run to run.

    Raises:
        RuntimeError: as the forward pass; ``torch.use_deterministic_algorithms(True)`` was called.
    """
    _check(value, spatial_shapes, sampling_locations, attention_weights)
    expected = (value.shape[0], sampling_locations.shape[1], value.shape[2] * value.shape[3])
    if grad_output.shape != expected:
        raise RuntimeError(f"ms_deform_attn: grad_output must be {list(expected)}, got {list(grad_output.shape)}")
    if torch.are_deterministic_algorithms_enabled():
        message = "ms_deform_attn: the gradient of value does not repeat exactly in Triton (atomic additions)"
        if not torch.is_deterministic_algorithms_warn_only_enabled():
            raise RuntimeError(f"{message}, but torch.use_deterministic_algorithms(True) was called")
        warnings.warn(message, stacklevel=2)
    grad_value = torch.zeros_like(value, dtype=torch.float32, memory_format=torch.contiguous_format)
    grads = [
        torch.zeros_like(x, memory_format=torch.contiguous_format) for x in (sampling_locations, attention_weights)
    ]
    if value.numel() and attention_weights.numel():
        levels = _level_table(tuple(spatial_shapes), value.device)
        inputs = (grad_output, value, levels, sampling_locations, attention_weights)
        _launch(_backward_kernel, (*(x.contiguous() for x in inputs), grad_value, *grads), value, sampling_locations)
    return grad_value.to(value.dtype), *grads


def probe(device: torch.device) -> None:
    """Compile and launch a kernel on ``device``; raises whatever Triton does where that can't be done."""
    value, locations, weights = (
        torch.zeros(x, device=device) for x in ((1, 1, 1, 1), (1, 1, 1, 1, 1, 2), (1, 1, 1, 1, 1))
    )
    ms_deform_attn_triton(value, [1, 1], locations, weights)
