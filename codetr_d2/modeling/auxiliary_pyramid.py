"""The pyramid that the auxiliary heads read, made from the encoder's output."""

import torch.nn.functional as F
from torch import nn

from .neck import ConvGN
from .pyramid import FeaturePyramid

__all__ = ["CoarserLevel", "LevelsFromOne", "auxiliary_level_class"]


class CoarserLevel(ConvGN):
    """The encoder's levels, and one coarser level by a convolution of stride 2. That is how Co-DETR was published."""

    def __init__(self, channels: int):
        super().__init__(channels, channels, 3, stride=2, bias=True)

    @staticmethod
    def strides(strides: list[int]) -> list[int]:
        """Strides of the encoder's levels -> those of the pyramid."""
        return [*strides, 2 * strides[-1]]

    def forward(self, memory: FeaturePyramid) -> FeaturePyramid:
        """The encoder's output -> the pyramid."""
        return memory.with_coarser_level(super().forward(memory.maps()[-1]))


class LevelsFromOne(nn.Module):
    """Five levels from the single one of an encoder of stride s, with the strides s/2, s, 2s, 4s, 8s.

    The encoder's output is sampled up and down bilinearly, always by two, and each level has a 3x3 convolution of its
    own. Source: paper, section 3.2.
    """

    def __init__(self, channels: int):
        super().__init__()
        self.convs = nn.ModuleList(ConvGN(channels, channels, 3) for _ in range(5))

    @staticmethod
    def strides(strides: list[int]) -> list[int]:
        """The encoder's stride -> those of the pyramid."""
        [stride] = strides
        return [stride // 2, *(stride * 2**i for i in range(4))]

    def forward(self, memory: FeaturePyramid) -> FeaturePyramid:
        """The encoder's output -> the pyramid."""
        [x] = memory.maps()
        levels = [F.interpolate(x, scale_factor=2, mode="bilinear", align_corners=False), x]
        for _ in range(3):
            # Bilinear sampling by a half is the mean of two by two cells; a last odd row or column stays by itself.
            levels.append(F.avg_pool2d(levels[-1], 2, ceil_mode=True))
        levels = [conv(level) for conv, level in zip(self.convs, levels)]
        return memory.with_levels(levels, self.strides(memory.geometry.strides))


def auxiliary_level_class(num_levels: int) -> type[CoarserLevel] | type[LevelsFromOne]:
    """What makes the auxiliary heads' pyramid of an encoder's output of so many levels."""
    return LevelsFromOne if num_levels == 1 else CoarserLevel
