"""The page of a run, or of two runs side by side: one file of HTML that needs neither network nor server."""

import json
from collections.abc import Sequence
from pathlib import Path

from .. import __version__
from ..checkpoint.checkpointer import atomic_write
from ..errors import InputError, named_disk_problems
from .errors import ERROR_KINDS
from .pictures import choose_images, difference, number_of_errors, picture_data
from .run import Run
from .run_data import Evaluated, run_data, tasks

__all__ = ["MAX_BYTES", "page_data", "write_run_page"]

MAX_BYTES = 15_000_000  # of a page; pictures that do not fit are left out, the least bad ones first
FOLDER = Path(__file__).parent


def write_run_page(runs: Sequence[Run], output: Path, with_cost: bool = True) -> None:
    """Write the page.

    Args:
        runs: one, or two on the same test dataset.
        output: the file; its folder is made.
        with_cost: whether to measure parameters, FLOPs and time of the models.

    Raises:
        InputError: the runs are of different datasets, an image is at fault, or the disk is full.
    """
    data = page_data(runs, with_cost)
    page = (FOLDER / "run_page.html").read_text(encoding="utf-8")
    title = " and ".join(x["name"] for x in data["runs"])
    # No character of the data can end its element.
    text = json.dumps(data, ensure_ascii=True, separators=(",", ":"), allow_nan=False).replace("<", "\\u003c")
    parts = {
        "TITLE": title.replace("&", "&amp;").replace("<", "&lt;"),
        "STYLE": (FOLDER / "run_page.css").read_text(encoding="utf-8"),
        "SCRIPT": (FOLDER / "run_page.js").read_text(encoding="utf-8"),
        "DATA": text,
    }
    for name, part in parts.items():
        page = page.replace(f"{{{{{name}}}}}", part, 1)
    with named_disk_problems(str(output)):
        output.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(str(output), lambda file: file.write(page.encode()))


def page_data(runs: Sequence[Run], with_cost: bool = True) -> dict:
    """What the page holds: ``runs``, ``classes``, ``kinds``, ``pictures`` as :func:`run_data` and
    :func:`picture_data` give them, ``num_images`` of the dataset, ``version`` of this package.

    Raises:
        InputError: as :func:`write_run_page`.
    """
    first = runs[0]
    for other in runs[1:]:
        if other.dataset.records != first.dataset.records or other.class_names != first.class_names:
            raise InputError(
                f"{other.folder} is tested on {other.dataset.source} and {first.folder} on {first.dataset.source}, so "
                "that they could not be compared; evaluate both on the same dataset"
            )
    evaluated = [{task: Evaluated(run, task) for task in tasks(run)} for run in runs]
    data = {
        "version": __version__,
        "classes": first.class_names,
        "kinds": ERROR_KINDS,
        "num_images": len(first.dataset.records),
        "runs": [run_data(run, own, with_cost) for run, own in zip(runs, evaluated)],
        "pictures": [],
    }
    number = data["num_images"]
    boxes = [(own["bbox"], run["tasks"]["bbox"]["best_bin"]) for own, run in zip(evaluated, data["runs"])]
    badness = number_of_errors(*boxes[0], number) if len(runs) == 1 else difference(*boxes, number)
    space = MAX_BYTES - 200_000 - len(json.dumps(data))
    for picture in picture_data(runs, evaluated, choose_images(badness)):
        space -= len(json.dumps(picture))
        if space < 0:
            break
        data["pictures"].append(picture)
    return data
