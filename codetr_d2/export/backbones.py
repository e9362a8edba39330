"""Backbones as a chain of stages, each of which ``torch.export`` takes at any sizes of its input.

Sizes behind many strides are nested roundings of the picture's; within one stage they are simple.
"""

import copy
import functools
from collections.abc import Iterator

import torch
import torch.nn.functional as F
from detectron2.modeling import Backbone
from detectron2.modeling.backbone.swin import BasicLayer, SwinTransformerBlock
from timm.layers import Conv2dSame
from timm.layers.conv2d_same import conv2d_same as timm_conv2d_same
from torch import Tensor, nn

from ..errors import InputError
from ..modeling.backbones.eva02 import Eva02Pyramid
from ..modeling.backbones.swin import SwinBackbone

__all__ = ["backbone_stages", "conv2d_same", "missing"]


def backbone_stages(
    backbone: Backbone, in_features: list[str], has_one_size: bool
) -> list[tuple[nn.Module, list[str]]]:
    """Modules that follow each other, [B, C, H, W] -> list of maps, and the names of the features among these.

    The next module reads the first map of a list, and the features are the last ones.

    Args:
        backbone: of the model.
        in_features: the features that are needed.
        has_one_size: images are of one size, which the backbone may then rely on.

    Raises:
        InputError: the backbone computes with sizes in a way that a graph cannot hold.
    """
    if isinstance(backbone, SwinBackbone):
        return list(_swin_stages(backbone, in_features))
    if isinstance(backbone, Eva02Pyramid) and not has_one_size:
        raise InputError(
            "EVA-02 is exported for one size of images alone: set MODEL.CODETR.CANVAS_SIZE (as in "
            "configs/co_dino_vit) to the side of the square that pictures are put on"
        )
    return [(_Whole(backbone, in_features), in_features)]


@torch.library.custom_op("codetr_d2::conv2d_same", mutates_args=())
def conv2d_same(
    x: Tensor, weight: Tensor, bias: Tensor | None, stride: list[int], dilation: list[int], groups: int
) -> Tensor:
    """TensorFlow's convolution with "SAME" padding, as one operator: its arithmetic of sizes is not traced."""
    return timm_conv2d_same(x, weight, bias, tuple(stride), (0, 0), tuple(dilation), groups)


@conv2d_same.register_fake
def _(x, weight, bias, stride, dilation, groups):
    return x.new_empty(x.shape[0], weight.shape[0], *(-(-side // s) for side, s in zip(x.shape[2:], stride)))


def _conv2d_same_of(conv: Conv2dSame, x: Tensor) -> Tensor:
    return conv2d_same(x, conv.weight, conv.bias, list(conv.stride), list(conv.dilation), conv.groups)


def missing(size: int, unit: int) -> int:
    """What ``size`` lacks to a multiple of ``unit``. Not ``-size % unit``: ONNX divides negative numbers otherwise."""
    return (size + unit - 1) // unit * unit - size


class _Whole(nn.Module):
    """All of a backbone."""

    def __init__(self, backbone: Backbone, in_features: list[str]):
        super().__init__()
        has_same_padding = any(type(module) is Conv2dSame for module in backbone.modules())
        self.backbone = copy.deepcopy(backbone) if has_same_padding else backbone
        for module in self.backbone.modules():
            if type(module) is Conv2dSame:
                module.forward = functools.partial(_conv2d_same_of, module)
        self.in_features = in_features

    def forward(self, x: Tensor) -> list[Tensor]:
        features = self.backbone(x)
        return [features[name] for name in self.in_features]


def _swin_stages(backbone: SwinBackbone, in_features: list[str]) -> Iterator[tuple[nn.Module, list[str]]]:
    yield _SwinEmbedding(backbone.patch_embed), []
    for i, layer in enumerate(backbone.layers):
        is_feature = f"p{i}" in in_features
        yield _SwinStage(layer, getattr(backbone, f"norm{i}") if is_feature else None), [f"p{i}"] if is_feature else []


class _SwinEmbedding(nn.Module):
    """detectron2's ``PatchEmbed``, for any size."""

    def __init__(self, embedding: nn.Module):
        super().__init__()
        self.embedding = embedding

    def forward(self, x: Tensor) -> list[Tensor]:
        bottom, right = (missing(side, patch) for side, patch in zip(x.shape[2:], self.embedding.patch_size))
        x = self.embedding.proj(F.pad(x, (0, right, 0, bottom)))
        if self.embedding.norm is not None:
            x = self.embedding.norm(x.permute(0, 2, 3, 1)).permute(0, 3, 1, 2)
        return [x]


class _SwinStage(nn.Module):
    """detectron2's ``BasicLayer`` and the norm of its feature, for any size: [what the next stage reads, feature]."""

    def __init__(self, layer: BasicLayer, norm: nn.Module | None):
        super().__init__()
        self.layer = layer
        self.norm = norm

    def forward(self, x: Tensor) -> list[Tensor]:
        x = x.permute(0, 2, 3, 1)
        window = self.layer.window_size
        rows, columns = ((side + window - 1) // window for side in x.shape[1:3])  # of windows
        regions = _shifted_regions(rows, columns, window, self.layer.shift_size, x.device)
        for block in self.layer.blocks:
            x = _swin_block(block, x, rows, columns, regions)
        outputs = []
        if self.layer.downsample is not None:
            merge = self.layer.downsample
            y = F.pad(x, (0, 0, 0, x.shape[2] % 2, 0, x.shape[1] % 2))
            y = torch.cat([y[:, i::2, j::2] for j in (0, 1) for i in (0, 1)], dim=-1)
            outputs.append(merge.reduction(merge.norm(y)).permute(0, 3, 1, 2))
        if self.norm is not None:
            outputs.append(self.norm(x).permute(0, 3, 1, 2))
        return outputs


def _shifted_regions(rows: int, columns: int, window: int, shift: int, device: torch.device) -> Tensor:
    """[windows, tokens, tokens] float32: -100 between tokens of a window that the shift brought together, else 0."""
    regions = []
    for count in (rows, columns):
        index = torch.arange(count * window, device=device)
        regions.append((index >= count * window - window).long() + (index >= count * window - shift).long())
    regions = _windows((regions[0][:, None] * 3 + regions[1])[None, :, :, None], rows, columns, window).squeeze(-1)
    return (regions.unsqueeze(1) != regions.unsqueeze(2)).float() * -100.0


def _windows(x: Tensor, rows: int, columns: int, window: int) -> Tensor:
    """[B, rows * window, columns * window, C] -> [B * rows * columns, window * window, C]."""
    x = x.reshape(x.shape[0], rows, window, columns, window, x.shape[3]).permute(0, 1, 3, 2, 4, 5)
    return x.reshape(-1, window * window, x.shape[5])


def _swin_block(block: SwinTransformerBlock, x: Tensor, rows: int, columns: int, regions: Tensor) -> Tensor:
    """[B, H, W, C] -> [B, H, W, C]"""
    batch, height, width, dim = x.shape
    window, shift = block.window_size, block.shift_size
    padding = (0, 0, 0, columns * window - width, 0, rows * window - height)
    y = F.pad(block.norm1(x), padding)
    if shift:
        y = torch.roll(y, (-shift, -shift), (1, 2))
    y = _window_attention(block.attn, _windows(y, rows, columns, window), regions if shift else None, batch)
    y = y.reshape(batch, rows, columns, window, window, dim).permute(0, 1, 3, 2, 4, 5)
    y = y.reshape(batch, rows * window, columns * window, dim)
    if shift:
        y = torch.roll(y, (shift, shift), (1, 2))
    x = x + y[:, :height, :width]
    return x + block.mlp(block.norm2(x))


def _window_attention(attention: nn.Module, x: Tensor, regions: Tensor | None, batch: int) -> Tensor:
    """detectron2's ``WindowAttention``. [windows of all images, tokens, C] -> the same."""
    tokens, heads = x.shape[1], attention.num_heads
    query, key, value = attention.qkv(x).unflatten(2, (3, heads, -1)).permute(2, 0, 3, 1, 4).unbind(0)
    bias = attention.relative_position_bias_table[attention.relative_position_index.flatten()]
    bias = bias.view(tokens, tokens, heads).permute(2, 0, 1).unsqueeze(0)
    if regions is not None:
        bias = (bias + regions.unsqueeze(1)).repeat(batch, 1, 1, 1)  # for the windows of each image
    weights = ((query * attention.scale) @ key.transpose(-2, -1) + bias).softmax(-1)
    return attention.proj((weights @ value).transpose(1, 2).flatten(2))
