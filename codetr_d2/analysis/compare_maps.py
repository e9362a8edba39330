"""The measurement that :mod:`discriminability` and :mod:`attention` share: maps of models against the ground truth."""

from collections.abc import Callable, Iterable
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from ..errors import InputError
from . import plots
from .maps import IoFIoBCurve, foreground_mask
from .models import AnalysedModel, images
from .results import write_rows

__all__ = ["compare_maps"]

NUM_PICTURES = 4  # images whose maps are drawn


@torch.no_grad()
def compare_maps(
    models: Iterable[AnalysedModel],
    num_images: int,
    output: Path,
    *,
    name: str,
    maps_of: Callable[[AnalysedModel, dict], dict[str, Tensor]],
    title: str,
    map_label: str,
) -> list[dict]:
    """Draw the IoF-IoB curves and some of the maps of models, and write their numbers.

    Writes ``<name>.png`` (curves), ``<name>_maps.png``, ``<name>.json`` and ``.csv`` (what is returned) and
    ``<name>_curves.json`` and ``.csv`` (the curves' points). No map is kept but those that are drawn.

    Args:
        models: what to compare.
        num_images: how many images of the test dataset.
        output: a folder that exists.
        name: what files are called.
        maps_of: (model, input of the model) -> by their sources maps of the image, [height, width] from 0 to 1.
        title: what is measured.
        map_label: what the colours of a map mean.

    Returns:
        A row for each model and source: ``model``, ``source``, ``area`` under the curve, ``images``.

    Raises:
        InputError: the dataset is at fault, the images have no objects, or a model computes no finite numbers.
    """
    rows, points, lines, columns, pictures = [], [], [], {}, []
    foregrounds = set()
    for analysed in models:
        curves, count = {}, 0
        for count, x in enumerate(tqdm(images(analysed, num_images), desc=analysed.name), 1):
            foreground = foreground_mask(x["instances"])
            foregrounds.add("masks" if x["instances"].has("gt_masks") else "boxes")
            for source, scores in maps_of(analysed, x).items():
                if not scores.isfinite().all():
                    raise InputError(f"{analysed.name}: the model computes no finite numbers; use other weights")
                curves.setdefault(source, IoFIoBCurve()).add(scores.cpu(), foreground)
                if count <= NUM_PICTURES:
                    columns.setdefault(f"{analysed.name}: {source}", []).append(scores.cpu())
            if len(pictures) < min(count, NUM_PICTURES):  # those of the first model
                picture = plots.to_rgb(x["image"], analysed.cfg.INPUT.FORMAT)
                pictures.append((picture, x["instances"].gt_boxes.tensor))
        for source, curve in curves.items():
            if not curve.counts.sum(dim=1).all():
                missing = "background" if curve.counts[1].any() else "objects"
                raise InputError(f"the {count} images of the test dataset have no {missing}; raise --images")
            thresholds, iob, iof = (x.tolist() for x in curve.points())
            row = {"model": analysed.name, "source": source, "area": curve.area(), "images": count}
            rows.append(row)
            for threshold, x, y in zip(thresholds, iob, iof):
                point = {"threshold": round(threshold, 5), "IoB": x, "IoF": y}
                points.append({"model": analysed.name, "source": source, **point})
            label = f"{analysed.name}: {source} (area {row['area']:.3f})"
            # From (1, 1), which a threshold below 0 gives, to (0, 0).
            lines.append(plots.Line(label, [1.0, *iob, 0.0], [1.0, *iof, 0.0]))
    write_rows(output, name, rows)
    write_rows(output, f"{name}_curves", points)
    what = f"foreground by {' and '.join(sorted(foregrounds))}"
    plots.draw_lines(
        output / f"{name}.png",
        lines,
        title=f"{title}\n{count} images, {what}",
        x_label="IoB: share of the background's pixels above the threshold",
        y_label="IoF: share of the foreground's pixels above the threshold",
        is_share=True,
    )
    plots.draw_maps(output / f"{name}_maps.png", pictures, columns, title=title, colour_label=map_label)
    return rows
