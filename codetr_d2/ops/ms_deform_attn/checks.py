"""What the inputs of deformable attention must be, for the backends in Python; the C++ has its own checks."""

from collections.abc import Sequence

from torch import Tensor

__all__ = ["check_inputs"]


def check_inputs(value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor) -> None:
    """Refuse sizes, dtypes and devices that don't fit each other.

    Sizes may be symbols of the compiler's: they are compared only where they must be equal, and written out only in an
    error, so that none of them becomes a fixed number.

    Raises:
        RuntimeError: which input does not fit.
    """
    if value.dim() != 4:
        raise RuntimeError(f"ms_deform_attn: value must be [B, S, heads, D], got {list(value.shape)}")
    batch, num_tokens, heads, _ = value.shape
    sizes = list(zip(spatial_shapes[::2], spatial_shapes[1::2]))
    tokens = sum(height * width for height, width in sizes)
    if len(spatial_shapes) % 2 or any(size < 0 for size in spatial_shapes) or tokens != num_tokens:
        raise RuntimeError(
            f"ms_deform_attn: spatial_shapes {list(spatial_shapes)} hold {tokens} tokens, value has {num_tokens}"
        )
    queries, points = (locations.shape[1], locations.shape[4]) if locations.dim() == 6 else ("Q", "P")
    expected = [batch, queries, heads, len(sizes), points]
    for name, tensor, shape in (
        ("sampling_locations", locations, [*expected, 2]),
        ("attention_weights", weights, expected),
    ):
        if list(tensor.shape) != shape or not tensor.is_floating_point() or tensor.device != value.device:
            raise RuntimeError(
                f"ms_deform_attn: {name} must be floating point [{', '.join(map(str, shape))}] on {value.device}, "
                f"got {tensor.dtype} {list(tensor.shape)} on {tensor.device}"
            )
