"""The feature pyramid that flows through the model, and what only the sizes of a batch decide about it.

Shapes use B images, L feature levels, S tokens (all cells of all levels), C channels.
"""

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cached_property

import torch
import torch.nn.functional as F
from torch import Tensor

__all__ = ["FeaturePyramid", "Geometry", "build_pyramid"]


@dataclass(frozen=True, eq=False)
class Geometry:
    """Sizes of a batch and of its feature levels, and what follows from them. Made once for a batch.

    Images lie at the top left of the padded batch, so the padding of a level is some of its last rows and columns.
    Tensors are on the device of the features, and none carries a gradient.

    Attributes:
        shapes: (height, width) of each level, from fine to coarse.
        strides: pixels of the network input that a cell of each level spans.
        image_sizes: (height, width) of each image inside the padded batch, in pixels: what "valid" means.
        batch_shape: (height, width) of the padded batch, in pixels.
        padded_sizes: ``image_sizes`` with each image padded as if it were alone in its batch: where anchors may lie.
        row_padding, column_padding: for each level [B, height] and [B, width] bool, True in the padding of an image.
    """

    shapes: Sequence[tuple[int, int]]
    strides: Sequence[int]
    image_sizes: Sequence[tuple[int, int]]
    batch_shape: tuple[int, int]
    padded_sizes: Sequence[tuple[int, int]]
    row_padding: Sequence[Tensor]
    column_padding: Sequence[Tensor]

    @classmethod
    def build(
        cls,
        shapes: Sequence[tuple[int, int]],
        strides: Sequence[int],
        image_sizes: Sequence[tuple[int, int]],
        batch_shape: tuple[int, int],
        size_divisibility: int = 1,
        device: torch.device | str = "cpu",
    ) -> "Geometry":
        """The geometry of levels that show the whole padded batch.

        Args:
            shapes, strides, image_sizes, batch_shape: see the class.
            size_divisibility: an image that is alone in its batch is padded to multiples of so many pixels.
            device: of the tensors.
        """
        unit = size_divisibility
        rows, columns = _padding(image_sizes, batch_shape, shapes, device)
        return cls(
            shapes=list(shapes),
            strides=list(strides),
            image_sizes=list(image_sizes),
            batch_shape=batch_shape,
            padded_sizes=[(math.ceil(h / unit) * unit, math.ceil(w / unit) * unit) for h, w in image_sizes],
            row_padding=rows,
            column_padding=columns,
        )

    def with_coarser_level(self, shape: tuple[int, int]) -> "Geometry":
        """The same with one level more, of twice the stride, whose padding follows from the coarsest level's."""
        return dataclasses.replace(
            self,
            shapes=[*self.shapes, shape],
            strides=[*self.strides, 2 * self.strides[-1]],
            row_padding=[*self.row_padding, _resize(self.row_padding[-1], shape[0])],
            column_padding=[*self.column_padding, _resize(self.column_padding[-1], shape[1])],
        )

    def with_levels(self, shapes: Sequence[tuple[int, int]], strides: Sequence[int]) -> "Geometry":
        """The same images on other levels, as :meth:`build` makes them."""
        device = self.row_padding[0].device
        rows, columns = _padding(self.image_sizes, self.batch_shape, shapes, device)
        return dataclasses.replace(
            self, shapes=list(shapes), strides=list(strides), row_padding=rows, column_padding=columns
        )

    @property
    def level_sizes(self) -> list[int]:
        """Number of tokens of each level."""
        return [height * width for height, width in self.shapes]

    @property
    def is_padded(self) -> bool:
        """Whether any image has padding."""
        return any(size != self.batch_shape for size in self.image_sizes)

    @cached_property
    def level_padding(self) -> list[Tensor]:
        """For each level [B, height, width] bool, True where a cell lies in the padding of its image."""
        return [rows[:, :, None] | columns[:, None] for rows, columns in zip(self.row_padding, self.column_padding)]

    @cached_property
    def padding_mask(self) -> Tensor:
        """[B, S] bool, True where a token lies in the padding of its image."""
        return torch.cat([x.flatten(1) for x in self.level_padding], dim=1)

    @property
    def value_mask(self) -> Tensor | None:
        """``padding_mask`` for attention; None where no image is padded, as there is nothing to leave out then."""
        return self.padding_mask if self.is_padded else None

    @cached_property
    def valid_ratios(self) -> Tensor:
        """[B, L, 2] float32, the share (x, y) of each level that is not padding."""
        ratios = [
            torch.stack([(~padding).float().mean(1) for padding in (columns, rows)], dim=-1)
            for rows, columns in zip(self.row_padding, self.column_padding)
        ]
        return torch.stack(ratios, dim=1)

    @cached_property
    def image_sizes_xyxy(self) -> Tensor:
        """[B, 4] float32, (width, height, width, height) of each image in pixels: the scale of normalised boxes."""
        sizes = [(w, h, w, h) for h, w in self.image_sizes]
        return torch.tensor(sizes, dtype=torch.float32, device=self.row_padding[0].device)

    @cached_property
    def cell_centres(self) -> Tensor:
        """[B, S, 2] float32, the centre (x, y) of each token's cell, normalised by the valid part of its level."""
        device = self.row_padding[0].device
        centres = []
        for level, (height, width) in enumerate(self.shapes):
            y = (torch.arange(height, device=device) + 0.5) / (self.valid_ratios[:, level, 1:] * height)  # [B, height]
            x = (torch.arange(width, device=device) + 0.5) / (self.valid_ratios[:, level, :1] * width)
            cells = torch.stack((x[:, None].expand(-1, height, -1), y[:, :, None].expand(-1, -1, width)), dim=-1)
            centres.append(cells.flatten(1, 2))
        return torch.cat(centres, dim=1)

    @cached_property
    def reference_points(self) -> Tensor:
        """[B, S, L, 2] (x, y), the centre of each token's cell in fractions of every level's map, padding included."""
        return self.cell_centres.unsqueeze(2) * self.valid_ratios.unsqueeze(1)


@dataclass
class FeaturePyramid:
    """Feature maps of several strides, flattened to one sequence of tokens.

    Tokens go level by level from the finest to the coarsest one, row by row inside a level.

    Attributes:
        tokens: [B, S, C] features.
        geometry: the sizes of levels and images, and where padding is.
    """

    tokens: Tensor
    geometry: Geometry

    def with_tokens(self, tokens: Tensor) -> "FeaturePyramid":
        """Other features of the same cells."""
        return FeaturePyramid(tokens, self.geometry)

    def maps(self) -> list[Tensor]:
        """The levels as maps, each [B, C, height, width], in channels-last layout."""
        levels = self.tokens.split(self.geometry.level_sizes, dim=1)
        # In this order the strides are those of channels last for a single image too, and convolutions take it as such.
        return [x.unflatten(1, shape).permute(0, 3, 1, 2) for x, shape in zip(levels, self.geometry.shapes)]

    def with_levels(self, levels: list[Tensor], strides: Sequence[int]) -> "FeaturePyramid":
        """Other levels of the same images: maps [B, C, height, width] from fine to coarse, and their strides."""
        shapes = [tuple(x.shape[-2:]) for x in levels]
        return FeaturePyramid(_tokens(levels), self.geometry.with_levels(shapes, strides))

    def with_coarser_level(self, coarsest: Tensor) -> "FeaturePyramid":
        """The pyramid with one level more: [B, C, height, width] features of twice the coarsest stride."""
        tokens = torch.cat((self.tokens, coarsest.flatten(2).transpose(1, 2)), dim=1)
        return FeaturePyramid(tokens, self.geometry.with_coarser_level(tuple(coarsest.shape[-2:])))


def build_pyramid(
    levels: list[Tensor],
    strides: list[int],
    image_sizes: Sequence[tuple[int, int]],
    batch_shape: tuple[int, int],
    size_divisibility: int = 1,
) -> FeaturePyramid:
    """Flatten feature maps [B, C, height, width], from fine to coarse. Other arguments: see :meth:`Geometry.build`."""
    shapes = [tuple(x.shape[-2:]) for x in levels]
    geometry = Geometry.build(shapes, strides, image_sizes, batch_shape, size_divisibility, levels[0].device)
    return FeaturePyramid(_tokens(levels), geometry)


def _tokens(levels: list[Tensor]) -> Tensor:
    """Maps [B, C, height, width] -> [B, S, C]."""
    return torch.cat([x.flatten(2).transpose(1, 2) for x in levels], dim=1)


def _padding(
    image_sizes: Sequence[tuple[int, int]],
    batch_shape: tuple[int, int],
    shapes: Sequence[tuple[int, int]],
    device: torch.device | str,
) -> list[list[Tensor]]:
    """For rows and for columns the padding of each level, [B, height] and [B, width] bool."""
    padding = []
    for axis in (0, 1):
        sizes = torch.tensor([size[axis] for size in image_sizes], device=device)
        in_pixels = torch.arange(batch_shape[axis], device=device) >= sizes[:, None]  # [B, height or width]
        padding.append([_resize(in_pixels, shape[axis]) for shape in shapes])
    return padding


def _resize(padding: Tensor, size: int) -> Tensor:
    """[B, N] bool -> [B, size] bool, nearest."""
    return F.interpolate(padding.unsqueeze(1).float(), size=size).squeeze(1) > 0.5
