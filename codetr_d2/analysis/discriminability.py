"""How well feature norms tell objects from background, before and after the encoder (paper, eqs. 7 and 8)."""

from collections.abc import Iterable
from pathlib import Path

from torch import Tensor

from ..modeling.pyramid import FeaturePyramid
from .compare_maps import compare_maps
from .maps import combine_levels, levels_of_image
from .models import AnalysedModel

__all__ = ["discriminability_score", "measure_discriminability"]


def discriminability_score(pyramid: FeaturePyramid, image_size: tuple[int, int]) -> Tensor:
    """D(F) of the only image of a batch: the l2 norms of the features at every position, as one map.

    Source: paper, eq. 7.

    Args:
        pyramid: features of one image.
        image_size: (height, width) of the image in pixels.

    Returns:
        [height, width] between 0 and 1.
    """
    levels = levels_of_image(pyramid.tokens[0].float().norm(dim=-1), pyramid.geometry)
    return combine_levels(levels, pyramid.geometry.image_sizes[0], image_size)


def measure_discriminability(models: Iterable[AnalysedModel], num_images: int, output: Path) -> list[dict]:
    """Measure D(F) of the levels that the encoder reads ("backbone") and of its output ("encoder").

    Args, files, result and errors are those of :func:`~codetr_d2.analysis.compare_maps.compare_maps`.
    """
    return compare_maps(
        models,
        num_images,
        output,
        name="discriminability",
        maps_of=_maps_of,
        title="How feature norms tell objects from background",
        map_label="discriminability score D(F)",
    )


def _maps_of(analysed: AnalysedModel, x: dict) -> dict[str, Tensor]:
    size = tuple(x["image"].shape[-2:])
    pyramid = analysed.model.features(analysed.model.preprocess([x]))
    memory = analysed.model.encode(pyramid)
    return {"backbone": discriminability_score(pyramid, size), "encoder": discriminability_score(memory, size)}
