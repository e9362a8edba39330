"""How much the one-to-one matching changes while a model is trained: the instability IS (DN-DETR; paper, section 4)."""

import os
from collections.abc import Sequence
from pathlib import Path

from ..errors import InputError
from . import plots
from .matches import FILE_NAME, Matches
from .models import ModelSpec, check_names
from .results import write_rows

__all__ = ["compare_stability", "instability", "num_changed"]


def num_changed(before: Sequence[int], after: Sequence[int]) -> int:
    """How many queries are matched with another object than before, or are no longer, or newly, matched.

    Source: the sum over queries n of 1(V_n^i != V_n^(i-1)) in DN-DETR, where V_n is the object of query n, or -1.

    Args:
        before, after: of one image, for each object the index of its query, -1 for none.
    """
    old, new = ({query: i for i, query in enumerate(queries) if query >= 0} for queries in (before, after))
    return sum(old.get(query, -1) != new.get(query, -1) for query in old.keys() | new.keys())


def instability(matches: Matches) -> list[tuple[int, float]]:
    """IS of each evaluation but the first, as (iteration, mean over the images of :func:`num_changed`)."""
    pairs = zip(matches.evaluations, matches.evaluations[1:])
    return [
        (iteration, sum(map(num_changed, before, after)) / len(matches.image_ids))
        for (_, before), (iteration, after) in pairs
    ]


def compare_stability(specs: Sequence[ModelSpec], output: Path) -> list[dict]:
    """Draw the instability of some trainings.

    Writes ``stability.png``, ``stability.json`` and ``stability.csv``.

    Args:
        specs: for each training its name, and its ``OUTPUT_DIR`` in the place of a config file.
        output: a folder that exists.

    Returns:
        A row for each training and evaluation but its first: ``model``, ``iteration``, ``IS``, ``images``.

    Raises:
        InputError: a folder has no matches, those of fewer than two evaluations, or those of other images.
    """
    check_names(specs)
    rows, lines, image_ids = [], [], None
    for spec in specs:
        path = os.path.join(os.path.expanduser(spec.config_file), FILE_NAME)
        matches = Matches.read(path)
        if len(matches.evaluations) < 2:
            raise InputError(
                f"{path} has fewer than two evaluations to compare; train longer, or lower TEST.EVAL_PERIOD"
            )
        if image_ids is not None and matches.image_ids != image_ids:
            raise InputError(f"{path} has the matches of other images than those of {specs[0].name}")
        image_ids = matches.image_ids
        curve = instability(matches)
        rows += [{"model": spec.name, "iteration": i, "IS": x, "images": len(image_ids)} for i, x in curve]
        lines.append(plots.Line(spec.name, [i + 1 for i, _ in curve], [x for _, x in curve]))
    write_rows(output, "stability", rows)
    plots.draw_lines(
        output / "stability.png",
        lines,
        title=f"Instability of the matching, {len(image_ids)} images",
        x_label="iterations of the training",
        y_label="queries of an image that changed their object\nsince the evaluation before (IS)",
    )
    return rows
