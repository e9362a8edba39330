"""Frozen batch norm as a part of the convolution before it."""

import torch
import torch.nn.functional as F
from detectron2.layers import Conv2d, FrozenBatchNorm2d
from torch import Tensor, nn

__all__ = ["fold_frozen_batch_norm"]


class _FoldedConv2d(Conv2d):
    """detectron2's convolution with a FrozenBatchNorm2d behind it, computed as one convolution.

    A frozen batch norm scales and shifts each output channel by constants, which the filters and the bias can do: that
    saves two passes over the feature map. Parameters, buffers and their names stay as they are, and the filters are
    scaled anew at each call, so that loading weights needs no further care. Filters that are being trained are left
    alone: scaling them, and their gradients, costs what the passes over the feature map save.
    """

    def forward(self, x: Tensor) -> Tensor:
        if torch.is_grad_enabled() and self.weight.requires_grad:
            return super().forward(x)
        norm = self.norm
        scale = norm.weight * (norm.running_var + norm.eps).rsqrt()
        bias = norm.bias - norm.running_mean * scale
        if self.bias is not None:
            bias = bias + self.bias * scale
        weight = self.weight * scale[:, None, None, None]
        x = F.conv2d(x, weight, bias, self.stride, self.padding, self.dilation, self.groups)
        return x if self.activation is None else self.activation(x)


def fold_frozen_batch_norm(module: nn.Module) -> None:
    """Fold, in place, every FrozenBatchNorm2d below ``module`` that is the ``norm`` of a detectron2 ``Conv2d``."""
    for conv in module.modules():
        if type(conv) is Conv2d and isinstance(conv.norm, FrozenBatchNorm2d):
            conv.__class__ = _FoldedConv2d
