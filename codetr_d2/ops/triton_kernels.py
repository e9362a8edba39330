"""Deformable attention in Triton, for GPUs. Imported only where it is used: Triton comes with PyTorch on some systems.

With ``TRITON_INTERPRET=1`` in the environment before Triton is first imported, the same kernels run in Triton's
interpreter, on tensors of the CPU: slowly, for tests.

One program computes a block of queries of one image and head. Its tiles are [queries, channels], of a size that the
head's width alone decides. Sums are float32, whatever the tensors are.
"""

import warnings

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = ["INTERPRETED", "TRITON_DTYPES", "ms_deform_attn_triton", "ms_deform_attn_triton_backward", "probe"]

INTERPRETED = triton.knobs.runtime.interpret
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

    The last two comparisons hold unless the sizes of the levels are wrong: nothing outside ``value`` is ever touched.
    """
    token = first + row * width + column
    valid = valid & (row >= 0) & (row < height) & (column >= 0) & (column < width)
    return token.to(tl.int64), valid & (token >= 0) & (token < num_tokens)


@_jit
def _forward_kernel(
    value,  # [B, S, heads, D]
    spatial_shapes,  # [L, 2]
    level_start_index,  # [L]
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
        height = tl.load(spatial_shapes + 2 * level).to(tl.int32)
        width = tl.load(spatial_shapes + 2 * level + 1).to(tl.int32)
        first = tl.load(level_start_index + level).to(tl.int32)
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
    spatial_shapes,
    level_start_index,
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
        height = tl.load(spatial_shapes + 2 * level).to(tl.int32)
        width = tl.load(spatial_shapes + 2 * level + 1).to(tl.int32)
        first = tl.load(level_start_index + level).to(tl.int32)
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


def _check(
    value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, locations: Tensor, weights: Tensor
) -> None:
    """Refuse sizes, dtypes and devices that don't fit each other.

    Not the sizes of the levels: to look at numbers on a GPU would be to wait for it. The kernels are safe with any.
    """

    def check(fits: bool, name: str, expected: str, tensor: Tensor) -> None:
        if not fits:
            got = f"{tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            raise RuntimeError(f"ms_deform_attn: {name} must be {expected}, got {got}")

    check(value.dim() == 4, "value", "[B, S, heads, D]", value)
    check(value.dtype in TRITON_DTYPES, "value", "float32, float16 or bfloat16 for Triton", value)
    batch, _, heads, _ = value.shape
    levels = level_start_index.numel()
    queries, points = (locations.shape[1], locations.shape[4]) if locations.dim() == 6 else ("Q", "P")
    for name, tensor, sizes, floating in (
        ("spatial_shapes", spatial_shapes, [levels, 2], False),
        ("level_start_index", level_start_index, [levels], False),
        ("sampling_locations", locations, [batch, queries, heads, levels, points, 2], True),
        ("attention_weights", weights, [batch, queries, heads, levels, points], True),
    ):
        fits = list(tensor.shape) == sizes and (tensor.is_floating_point() if floating else tensor.dtype == torch.int64)
        kind = "floating point" if floating else "int64"
        shown = ", ".join(map(str, sizes))
        check(fits and tensor.device == value.device, name, f"{kind} [{shown}] on {value.device}", tensor)


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
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention on the GPU. Not differentiable by itself: the operator is.

    Arguments and result are those of :func:`codetr_d2.ops.ms_deform_attn`, in any strides. Nothing waits for the GPU.

    Raises:
        RuntimeError: sizes, dtypes or devices that don't fit each other; a value that is not of ``TRITON_DTYPES``.
    """
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    _check(*inputs)
    batch, _, heads, width = value.shape
    sizes = (batch, sampling_locations.shape[1], heads * width)
    if not value.numel() or not attention_weights.numel():
        return value.new_zeros(sizes)
    output = value.new_empty(sizes)
    _launch(_forward_kernel, (*(x.contiguous() for x in inputs), output), value, sampling_locations)
    return output


def ms_deform_attn_triton_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Tensor,
    level_start_index: Tensor,
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, given that of the output [B, Q, heads * D].

    Queries that sample the same token add to its gradient atomically, in float32 and in any order: on a GPU, the last
    bits of the gradient of ``value`` differ from run to run.

    Raises:
        RuntimeError: as the forward pass; ``torch.use_deterministic_algorithms(True)`` was called.
    """
    inputs = (value, spatial_shapes, level_start_index, sampling_locations, attention_weights)
    _check(*inputs)
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
        tensors = (x.contiguous() for x in (grad_output, *inputs))
        _launch(_backward_kernel, (*tensors, grad_value, *grads), value, sampling_locations)
    return grad_value.to(value.dtype), *grads


def probe(device: torch.device) -> None:
    """Compile and launch a kernel on ``device``; raises whatever Triton does where that can't be done."""
    value, sizes, starts, locations, weights = (
        torch.zeros(shape, dtype=dtype, device=device)
        for shape, dtype in (
            ((1, 1, 1, 1), torch.float32),
            ((1, 2), torch.int64),
            ((1,), torch.int64),
            ((1, 1, 1, 1, 1, 2), torch.float32),
            ((1, 1, 1, 1, 1), torch.float32),
        )
    )
    ms_deform_attn_triton(value, sizes, starts, locations, weights)
