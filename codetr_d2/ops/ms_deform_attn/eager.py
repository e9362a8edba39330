"""Deformable attention in plain PyTorch: the readable definition, and the oracle of the compiled kernels."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from torch import Tensor

from .checks import check_inputs

__all__ = ["ms_deform_attn_eager", "ms_deform_attn_eager_backward"]


def _prepare(value: Tensor, spatial_shapes: Sequence[int], locations: Tensor, weights: Tensor):
    """Lay out the inputs for ``grid_sample``, in float32 at least: images and heads become one batch axis.

    Returns:
        Grids [B*H, Q, L, P, 2] in -1..1, weights [B*H, Q, L, P], and (level, first token, map [B*H, D, height, width])
        of each level that is sampled at all: ``grid_sample`` refuses empty maps and grids.
    """
    check_inputs(value, spatial_shapes, locations, weights)
    dtype = torch.promote_types(value.dtype, torch.float32)
    # A location that is not a number samples nothing, like one outside; the bounds lie outside a map of any size.
    grids = 2 * locations.to(dtype).nan_to_num(nan=-2.0).clamp(-2.0, 3.0) - 1
    grids = grids.transpose(1, 2).flatten(0, 1)  # [B, Q, H, L, P, 2] -> [B*H, Q, L, P, 2]
    weights = weights.to(dtype).transpose(1, 2).flatten(0, 1)  # [B, Q, H, L, P] -> [B*H, Q, L, P]
    shapes = list(zip(spatial_shapes[::2], spatial_shapes[1::2]))
    features = value.to(dtype).permute(0, 2, 3, 1).flatten(0, 1)  # [B, S, H, D] -> [B*H, D, S]
    levels = features.split([height * width for height, width in shapes], dim=2)
    first = 0
    maps = []
    for level, (tokens, (height, width)) in enumerate(zip(levels, shapes)):
        if tokens.numel() and grids[:, :, level].numel():
            maps.append((level, first, tokens.unflatten(2, (height, width))))
        first += height * width
    return grids, weights, maps


def ms_deform_attn_eager(
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> Tensor:
    """Multi-scale deformable attention by ``grid_sample``, on any device and dtype, differentiable by plain autograd.

    Arguments and result are those of :func:`codetr_d2.ops.ms_deform_attn`, with ``spatial_shapes`` as a flat list.
    """
    grids, weights, maps = _prepare(value, spatial_shapes, sampling_locations, attention_weights)
    batch, _, num_heads, head_dim = value.shape
    num_queries = sampling_locations.shape[1]
    output = weights.new_zeros(batch * num_heads, head_dim, num_queries)
    # Sums of nothing: they keep the inputs in the graph where nothing is sampled.
    output = output + value[:0].sum() + grids[:0].sum() + weights[:0].sum()
    for level, _, features in maps:
        sampled = F.grid_sample(features, grids[:, :, level], "bilinear", "zeros", align_corners=False)
        output = output + (sampled * weights[:, None, :, level]).sum(-1)  # [B*H, D, Q, P] -> [B*H, D, Q]
    # [B*H, D, Q] -> [B, Q, H*D]
    return output.reshape(batch, num_heads * head_dim, num_queries).transpose(1, 2).to(value.dtype).contiguous()


def ms_deform_attn_eager_backward(
    grad_output: Tensor,
    value: Tensor,
    spatial_shapes: Sequence[int],
    sampling_locations: Tensor,
    attention_weights: Tensor,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of value, locations and weights, given that of the output [B, Q, H*D].

    For the operator's backward pass, inside which autograd does not record.
    """
    grids, weights, maps = _prepare(value, spatial_shapes, sampling_locations, attention_weights)
    batch, num_tokens, num_heads, head_dim = value.shape
    num_queries = sampling_locations.shape[1]
    # [B, Q, H*D] -> [B*H, D, Q, 1]
    grad_output = grad_output.to(weights.dtype).mT.reshape(batch * num_heads, head_dim, num_queries, 1)
    grad_value = weights.new_zeros(batch * num_heads, head_dim, num_tokens)
    grad_grids, grad_weights = torch.zeros_like(grids), torch.zeros_like(weights)
    for level, first, features in maps:
        sampled = F.grid_sample(features, grids[:, :, level], "bilinear", "zeros", align_corners=False)
        grad_weights[:, :, level] = (sampled * grad_output).sum(1)
        grad_features, grad_grids[:, :, level] = torch.ops.aten.grid_sampler_2d_backward(
            grad_output * weights[:, None, :, level],
            features,
            grids[:, :, level],
            0,  # bilinear
            0,  # zeros outside
            False,  # align_corners
            (True, True),
        )
        grad_value[:, :, first : first + features[0, 0].numel()] = grad_features.flatten(2)

    def restore(grad: Tensor, like: Tensor) -> Tensor:  # [B*H, Q, ...] -> [B, Q, H, ...]
        return grad.reshape(batch, num_heads, *grad.shape[1:]).transpose(1, 2).to(like.dtype).contiguous()

    grad_value = grad_value.reshape(batch, num_heads, head_dim, num_tokens).permute(0, 3, 1, 2)
    return (
        grad_value.to(value.dtype).contiguous(),
        restore(2 * grad_grids, sampling_locations),
        restore(grad_weights, attention_weights),
    )
