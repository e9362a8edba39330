"""Channel mapper: backbone features -> levels of equal width."""

from math import gcd

from detectron2.layers import Conv2d, ShapeSpec
from torch import Tensor, nn

__all__ = ["ChannelMapper", "ConvGN"]


class ConvGN(nn.Sequential):
    """Convolution with GroupNorm and no activation.

    There are 32 groups, or fewer where the channels ask for it: a group has at least two channels, since one alone
    cannot be normalised on a level of a single cell.
    """

    def __init__(self, in_channels: int, out_channels: int, kernel_size: int, stride: int = 1, bias: bool = False):
        conv = Conv2d(in_channels, out_channels, kernel_size, stride, padding=kernel_size // 2, bias=bias)
        super().__init__(conv, nn.GroupNorm(gcd(32, out_channels // 2), out_channels))
        nn.init.xavier_uniform_(conv.weight)
        if bias:
            nn.init.zeros_(conv.bias)


class ChannelMapper(nn.Module):
    """A 1x1 convolution for each backbone feature; further levels by 3x3 convolutions of stride 2.

    Args:
        input_shapes: channels and stride of the backbone features, from fine to coarse.
        out_channels: channels of every level.
        num_levels: number of levels, at least as many as features.
    """

    PUBLISHED_NAMES = [
        (f"neck.{convs}.{{n}}.{published}.{{rest}}", f"{convs}.{{n}}.{ours}.{{rest}}")
        for convs in ("convs", "extra_convs")
        for published, ours in (("conv", 0), ("gn", 1))
    ]

    def __init__(self, input_shapes: list[ShapeSpec], out_channels: int, num_levels: int):
        super().__init__()
        if num_levels < len(input_shapes):
            raise ValueError(f"{len(input_shapes)} features do not fit into {num_levels} levels")
        self.convs = nn.ModuleList(ConvGN(shape.channels, out_channels, 1) for shape in input_shapes)
        channels = [input_shapes[-1].channels] + [out_channels] * num_levels
        num_extra = num_levels - len(input_shapes)
        self.extra_convs = nn.ModuleList(ConvGN(c, out_channels, 3, stride=2) for c in channels[:num_extra])
        coarsest = input_shapes[-1].stride
        self.strides = [shape.stride for shape in input_shapes] + [coarsest * 2 ** (i + 1) for i in range(num_extra)]

    def forward(self, features: list[Tensor]) -> list[Tensor]:
        """[B, C_i, h, w] features -> [B, out_channels, h, w] levels; extra ones start from the last feature."""
        levels = [conv(x) for conv, x in zip(self.convs, features)]
        x = features[-1]
        for conv in self.extra_convs:
            x = conv(x)
            levels.append(x)
        return levels
