"""The page of a dataset: what is in it, and what looks wrong with it."""

import base64
import io
import math
from collections import Counter, defaultdict
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
from jinja2 import Environment, PackageLoader, select_autoescape
from PIL import Image

from ..data.formats import Export, Problem
from ..data.images import read_image
from ..errors import InputError

__all__ = ["DatasetSummary", "Histogram", "summarize", "write_dataset_page"]

SPLITS = ("train", "val", "test")
_MAX_PICTURES = 60  # of the gallery
_MAX_OF_A_PROBLEM = 24  # pictures of one kind of problem; all are counted
_PICTURE_SIDE = 448  # pixels of the longer side, as shown
_QUALITY = 75  # of JPEG


@dataclass
class Histogram:
    """How many of something lie in each of some bins.

    Attributes:
        title: what is counted.
        labels: of the bins.
        counts: of each bin.
        note: the median and the extremes, in words.
    """

    title: str
    labels: list[str]
    counts: list[int]
    note: str


@dataclass
class DatasetSummary:
    """What the page shows, as numbers.

    Attributes:
        name: of the dataset.
        format: that it was read as.
        splits: those that there are, in order.
        totals: rows of (what, a number for each split).
        classes: rows of (name, objects for each split, pictures).
        histograms: of objects and pictures.
        shown: indices of the images of the gallery.
        problems: by kind, the problems; the most frequent kind first.
    """

    name: str
    format: str
    splits: list[str]
    totals: list[tuple[str, list[int]]] = field(default_factory=list)
    classes: list[tuple[str, list[int], int]] = field(default_factory=list)
    histograms: list[Histogram] = field(default_factory=list)
    shown: list[int] = field(default_factory=list)
    problems: dict[str, list[Problem]] = field(default_factory=dict)


def summarize(name: str, export: Export, splits: Sequence[str], problems: Sequence[Problem]) -> DatasetSummary:
    """Count what is in a dataset.

    Args:
        name: of the dataset.
        export: its pictures and objects.
        splits: "train", "val" or "test" of each picture.
        problems: all that were found, those of the export too.
    """
    images, annotations = export.coco["images"], export.coco["annotations"]
    used = [x for x in SPLITS if x in splits]
    index = {x["id"]: i for i, x in enumerate(images)}
    split_of = [splits[index[x["image_id"]]] for x in annotations]
    per_image = Counter(index[x["image_id"]] for x in annotations)
    summary = DatasetSummary(name, export.format, used)
    pictures, objects = Counter(splits), Counter(split_of)
    empty = Counter(split for i, split in enumerate(splits) if not per_image[i])
    for what, counts in (("pictures", pictures), ("pictures without an object", empty), ("objects", objects)):
        summary.totals.append((what, [counts[x] for x in used]))

    by_class = Counter((x["category_id"], split) for x, split in zip(annotations, split_of))
    images_of = defaultdict(set)
    for annotation in annotations:
        images_of[annotation["category_id"]].add(annotation["image_id"])
    rows = [
        (x["name"], [by_class[x["id"], split] for split in used], len(images_of[x["id"]]))
        for x in export.coco["categories"]
    ]
    summary.classes = sorted(rows, key=lambda row: -sum(row[1]))

    boxes = np.array([x["bbox"][2:] for x in annotations], dtype=np.float64).reshape(-1, 2)
    owners = np.array([index[x["image_id"]] for x in annotations], dtype=np.int64)
    sizes = np.array([(x["width"], x["height"]) for x in images], dtype=np.float64)
    has_area = (boxes > 0).all(axis=1)
    boxes, owners = boxes[has_area], owners[has_area]
    sides = np.sqrt(boxes.prod(axis=1))
    shares = 100 * sides / np.sqrt(sizes.prod(axis=1))[owners]
    numbers = np.array([per_image[i] for i in range(len(images))])
    summary.histograms = [
        _of_octaves("Size of objects: root of the area, in pixels", sides),
        _of_octaves("Size of objects in percent of their picture's, sides", shares, "%"),
        _of_ratios("Aspect ratio of objects: width / height", boxes[:, 0] / boxes[:, 1]),
        _of_numbers("Objects in a picture", numbers),
        _of_octaves("Size of pictures: shorter side, in pixels", sizes.min(axis=1)),
        _of_ratios("Aspect ratio of pictures: width / height", sizes[:, 0] / sizes[:, 1]),
    ]
    summary.shown = _choose_pictures(images, annotations, splits, index)
    kinds = Counter(x.kind for x in problems)
    summary.problems = {kind: [x for x in problems if x.kind == kind] for kind, _ in kinds.most_common()}
    return summary


def _note(values: np.ndarray, unit: str = "") -> str:
    if not len(values):
        return "none"
    shown = (f"{x:.0f}" if x >= 100 else f"{x:.3g}" for x in (values.min(), np.median(values), values.max()))
    least, middle, most = (x + unit for x in shown)
    return f"from {least} to {most}, median {middle}"


def _of_octaves(title: str, values: np.ndarray, unit: str = "") -> Histogram:
    """Bins of a factor of two."""
    if not len(values):
        return Histogram(title, [], [], _note(values))
    exponents = np.floor(np.log2(np.maximum(values, 2.0**-4))).astype(int)
    counts = Counter(exponents.tolist())
    bins = range(min(counts), max(counts) + 1)
    return Histogram(
        title, [f"{2.0**i:g} to {2.0 ** (i + 1):g}{unit}" for i in bins], [counts[i] for i in bins], _note(values, unit)
    )


def _of_ratios(title: str, values: np.ndarray) -> Histogram:
    """Bins around 1, two in a factor of two; the outer ones are open."""
    edges = [-5, -3, -1, 1, 3, 5]  # quarters of powers of two
    names = ["below 0.42", "0.42 to 0.59", "0.59 to 0.84", "0.84 to 1.19", "1.19 to 1.68", "1.68 to 2.38", "above 2.38"]
    found = np.digitize(np.log2(values) * 4, edges) if len(values) else np.zeros(0, dtype=int)
    return Histogram(title, names, np.bincount(found, minlength=len(names)).tolist(), _note(values))


def _of_numbers(title: str, values: np.ndarray) -> Histogram:
    """One bin for each small number, then octaves."""
    edges = [0, 1, 2, 3, 4, 5, 8, 16, 32, 64, 128, 256, 512]
    bins = [(low, high - 1) for low, high in zip(edges, edges[1:])]
    names = [f"{low}" if low == high else f"{low} to {high}" for low, high in bins] + [f"{edges[-1]} and more"]
    found = np.bincount(np.digitize(values, edges) - 1, minlength=len(names))
    last = int(np.flatnonzero(found).max(initial=0)) + 1
    return Histogram(title, names[:last], found[:last].tolist(), _note(values))


def _choose_pictures(images: list[dict], annotations: list[dict], splits: Sequence[str], index: dict) -> list[int]:
    """Pictures of all classes and splits by turns, evenly spaced, some without an object, and others."""
    groups = defaultdict(dict)  # dicts for their order
    for annotation in annotations:
        i = index[annotation["image_id"]]
        groups[annotation["category_id"], splits[i]][i] = None
    empty = _spaced(sorted(set(range(len(images))) - {i for group in groups.values() for i in group}), 4)
    each = math.ceil((_MAX_PICTURES - len(empty)) / max(len(groups), 1))
    lists = [_spaced(list(x), each) for x in groups.values()] + [empty]
    turns = [x[turn] for turn in range(max(map(len, lists))) for x in lists if turn < len(x)]
    chosen = list(dict.fromkeys(turns))[:_MAX_PICTURES]
    rest = sorted(set(range(len(images))) - set(chosen))
    return chosen + _spaced(rest, _MAX_PICTURES - len(chosen))


def _spaced(values: list[int], number: int) -> list[int]:
    """At most ``number`` of the values, evenly spaced."""
    number = min(number, len(values))
    return [values[i * len(values) // number] for i in range(number)]


def _picture(image: dict) -> str:
    """A picture as a data URI; "" where it cannot be read."""
    try:
        pixels = Image.fromarray(read_image(image["file_name"], "RGB", (image["width"], image["height"])))
    except InputError:
        return ""
    pixels.thumbnail((_PICTURE_SIDE, _PICTURE_SIDE), Image.Resampling.BILINEAR)
    file = io.BytesIO()
    pixels.save(file, "JPEG", quality=_QUALITY)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()


def write_dataset_page(file: Path, summary: DatasetSummary, export: Export, splits: Sequence[str]) -> None:
    """Write the page: one HTML file that needs no network.

    Args:
        file: where to.
        summary: what it shows.
        export: where the pictures are.
        splits: "train", "val" or "test" of each picture.
    """
    images = export.coco["images"]
    index = {x["id"]: i for i, x in enumerate(images)}
    names = {x["id"]: x["name"] for x in export.coco["categories"]}
    of_image = defaultdict(list)
    for annotation in export.coco["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    problems = [
        {"kind": kind, "number": len(found), "shown": found[:_MAX_OF_A_PROBLEM]}
        for kind, found in summary.problems.items()
    ]
    wanted = [images[i]["id"] for i in summary.shown]
    wanted += [i for x in problems for shown in x["shown"] for i in (shown.image_id, shown.other_image_id) if i]
    pictures = {}
    for image_id in dict.fromkeys(wanted):
        image = images[index[image_id]]
        objects = of_image[image_id]
        pictures[image_id] = {
            "name": Path(image["file_name"]).name,
            "split": splits[index[image_id]],
            "width": image["width"],
            "height": image["height"],
            "source": _picture(image),
            "objects": [[names[x["category_id"]], *x["bbox"]] for x in objects],
        }
    environment = Environment(loader=PackageLoader("codetr_d2.report", "."), autoescape=select_autoescape())
    page = environment.get_template("dataset_page.html").render(
        summary=summary,
        problems=problems,
        pictures=pictures,
        number=len(images),
        gallery=[images[i]["id"] for i in summary.shown],
        # Far apart, in degrees, for classes that follow each other.
        hues={name: round(137.5 * i) % 360 for i, (name, *_) in enumerate(summary.classes)},
    )
    file.write_text(page, encoding="utf-8")
