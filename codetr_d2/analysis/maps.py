"""Maps over an image, and how well they tell objects from background (paper, eqs. 7 and 8)."""

from collections.abc import Sequence

import torch
import torch.nn.functional as F
from detectron2.structures import Instances
from torch import Tensor

from ..modeling.pyramid import Geometry

__all__ = ["IoFIoBCurve", "combine_levels", "foreground_mask", "levels_of_image"]


def levels_of_image(values: Tensor, geometry: Geometry, image: int = 0) -> list[Tensor]:
    """[S] one number for each token -> the levels as maps [height, width], without the padding of the image.

    Args:
        values: of one image of the batch.
        geometry: of the batch.
        image: its index in the batch.
    """
    levels = []
    for x, shape, rows, columns in zip(
        values.split(geometry.level_sizes), geometry.shapes, geometry.row_padding, geometry.column_padding
    ):
        levels.append(x.view(shape)[~rows[image]][:, ~columns[image]])
    return levels


def combine_levels(levels: Sequence[Tensor], size: tuple[int, int], image_size: tuple[int, int]) -> Tensor:
    """One map of those of all levels: each resized to the image and divided by its maximum there, then their mean.

    With the l2 norms of the features this is the discriminability score D(F). Source: paper, eq. 7.

    Args:
        levels: maps [height, width] that are not negative and span ``size``.
        size: (height, width) in pixels of what the levels show: of the image, or of the canvas that it lies on.
        image_size: (height, width) in pixels of the image, at the top left of it.

    Returns:
        [height, width] of the image, between 0 and 1. A level that is 0 everywhere adds 0.
    """
    height, width = image_size
    total = 0
    for level in levels:
        resized = F.interpolate(level[None, None].float(), size, mode="bilinear", align_corners=False)
        resized = resized[0, 0, :height, :width]
        total = total + resized / resized.max().clamp(min=torch.finfo(resized.dtype).tiny)
    return total / len(levels)


def foreground_mask(instances: Instances) -> Tensor:
    """[height, width] bool, True at the pixels of the image that belong to an object.

    That is where ``gt_masks`` are; without these, where the centre of the pixel lies in one of ``gt_boxes``.
    """
    if instances.has("gt_masks"):
        return instances.gt_masks.tensor.any(dim=0)
    mask = torch.zeros(instances.image_size, dtype=torch.bool)
    for x0, y0, x1, y1 in (instances.gt_boxes.tensor - 0.5).ceil().clamp(min=0).int().tolist():
        mask[y0:y1, x0:x1] = True
    return mask


class IoFIoBCurve:
    """The IoF-IoB curve, added up over images of which nothing is kept.

    For a threshold S, IoF is the share of the foreground's pixels, and IoB that of the background's, at which the map
    exceeds S. The pixels are those of all images together. The higher the curve above the diagonal, the better the map
    tells objects from background. Source: paper, eq. 8.

    Attributes:
        thresholds: [N] float32, S from 0 to 1 in equal steps. They are many, as the norms of normalised features differ
            by less than a hundredth.
        counts: [2, N + 1] int64: of the background and of the foreground, how many pixels exceed so many thresholds.
    """

    def __init__(self, num_thresholds: int = 100_001):
        self.thresholds = torch.linspace(0, 1, num_thresholds)
        self.counts = torch.zeros(2, num_thresholds + 1, dtype=torch.int64)

    def add(self, scores: Tensor, foreground: Tensor) -> None:
        """
        Args:
            scores: [height, width] between 0 and 1, on any device.
            foreground: [height, width] bool.
        """
        num_exceeded = torch.bucketize(scores, self.thresholds.to(scores.device)).cpu()
        for is_foreground, counts in enumerate(self.counts):
            counts += num_exceeded[foreground == bool(is_foreground)].bincount(minlength=len(counts))

    def shares(self) -> tuple[Tensor, Tensor]:
        """IoB and IoF at every threshold, [N] float64 each; NaN where no image has background, or foreground."""
        # A pixel exceeds threshold k if it exceeds more than k of them.
        above = self.counts.flip(1).cumsum(1).flip(1)[:, 1:].double()
        return tuple(above / self.counts.sum(1, keepdim=True))

    def points(self, step: float = 0.002) -> tuple[Tensor, Tensor, Tensor]:
        """Thresholds, IoB and IoF for drawing, [M] each: of points whose IoB + IoF differ by less than about ``step``
        the one with the lowest threshold."""
        iob, iof = self.shares()
        place = ((iob + iof) / step).floor()
        kept = torch.ones(len(place), dtype=torch.bool)
        kept[1:] = place[1:] != place[:-1]
        return self.thresholds[kept], iob[kept], iof[kept]

    def area(self) -> float:
        """The area under the curve from (0, 0) to (1, 1).

        That is the chance that a pixel of the foreground has a higher score than one of the background, where two
        between the same thresholds count one half.
        """
        one = torch.ones(1, dtype=torch.float64)
        iob, iof = (torch.cat((one, x, 0 * one)) for x in self.shares())
        return torch.trapezoid(iof.flip(0), iob.flip(0)).item()
