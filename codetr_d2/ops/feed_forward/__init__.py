"""A transformer's feed-forward network: the operator ``torch.ops.codetr_d2._feed_forward_cpp`` on the CPU."""

import torch
from torch import Tensor
from torch.nn import functional as F

from ..library import library_is_loaded

__all__ = ["feed_forward"]

FORWARD_DTYPES = (torch.float32, torch.float64, torch.bfloat16)
BACKWARD_DTYPES = (torch.float32, torch.float64)


def _fake(x, weight1, bias1, weight2, bias2, keep_hidden):
    output = x.new_empty((x.shape[0], weight2.shape[0]))
    return output, x.new_empty((x.shape[0], weight1.shape[0]) if keep_hidden else (0,))


def _fake_backward(grad, x, hidden, weight1, weight2, needs_x, needs_weights):
    shapes = (x.shape, weight1.shape, hidden.shape[1:], weight2.shape)
    return tuple(x.new_empty(shape) for shape in shapes)


def _setup_context(ctx, inputs, output):
    x, weight1, _, weight2, _, _ = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros as large as the hidden features
    ctx.save_for_backward(x, output[1], weight1, weight2)


def _backward(ctx, grad, _):
    if grad is None:
        return (None,) * 6
    needs = ctx.needs_input_grad
    grads = torch.ops.codetr_d2._feed_forward_cpp_backward(grad, *ctx.saved_tensors, needs[0], any(needs[1:4]))
    return *grads, grad.sum(0), None


if library_is_loaded():
    torch.library.register_fake("codetr_d2::_feed_forward_cpp", _fake)
    torch.library.register_fake("codetr_d2::_feed_forward_cpp_backward", _fake_backward)
    torch.library.register_autograd("codetr_d2::_feed_forward_cpp", _backward, setup_context=_setup_context)


def feed_forward(
    x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, bias2: Tensor, dropout: float = 0.0
) -> Tensor:
    """Linear - ReLU - dropout - linear.

    On the CPU the compiled library computes it some rows at a time, so that a part of the hidden features is in the
    cache from its product to its last use: inference never holds them whole, training never their gradient. PyTorch's
    layers compute it where the library does not: on GPUs, with dropout, in float16, for gradients in bfloat16 or under
    autocast, or if it is not built.

    Args:
        x: [..., C] features.
        weight1, bias1: [H, C] and [H], of the layer from features to hidden features.
        weight2, bias2: [D, H] and [D], of the layer from there.
        dropout: the probability that a hidden feature is zeroed.

    Returns:
        [..., D].

    Raises:
        RuntimeError: sizes or dtypes that don't fit each other.
    """
    rows = x.flatten(0, -2)
    inputs = (rows, weight1, bias1, weight2, bias2)
    differentiable = torch.is_grad_enabled() and any(t.requires_grad for t in inputs)
    autocasts = torch.is_autocast_enabled("cpu") and x.dtype != torch.float64
    dtype = torch.get_autocast_dtype("cpu") if autocasts else x.dtype
    dtypes = FORWARD_DTYPES if not differentiable else () if autocasts else BACKWARD_DTYPES
    if library_is_loaded() and x.device.type == "cpu" and dtype in dtypes and dropout == 0:
        if autocasts:
            inputs = [t.to(dtype) for t in inputs]
        output, _ = torch.ops.codetr_d2._feed_forward_cpp(*inputs, differentiable)
    else:  # the output of a linear layer on rows is no view, and ReLU can work in place
        hidden = F.linear(rows, weight1, bias1).relu_()
        output = F.linear(F.dropout(hidden, dropout), weight2, bias2)
    return output.unflatten(0, x.shape[:-1])
