"""The pictures of the gallery: which, and what the page draws on them."""

import base64
import io
from collections.abc import Iterator, Sequence

import cv2
import numpy as np
from PIL import Image
from pycocotools import mask as mask_util

from ..data import read_image
from .detections import Task
from .errors import ERROR_KINDS
from .run import Run
from .run_data import Evaluated

__all__ = ["choose_images", "difference", "number_of_errors", "outline", "picture_data"]

MAX_PICTURES = 100
SHARE_OF_WORST = 0.75  # the other pictures are spread evenly over those that are left, from bad to good
LONG_SIDE = 720  # pixels of an embedded picture, at most
JPEG_QUALITY = 78
LEAST_BIN = 1  # of the score of a detection that the page can show
MAX_DETECTIONS = 100  # of a picture that it can show
CORRECT, IGNORED = "correct", "ignored"


def number_of_errors(evaluated: Evaluated, least: int, num_images: int) -> np.ndarray:
    """[I] errors in each image: wrong detections from a bin of the score on, and objects that none of these finds."""
    counts = evaluated.bins >= least
    wrong = counts & (evaluated.errors.kinds >= 0)
    is_found = np.append(counts, False)[evaluated.matches.found_by]  # -1, nothing, is the last one
    lost = ~evaluated.truth.crowds & ~is_found
    errors = np.bincount(evaluated.found.images[wrong], minlength=num_images)
    return errors + np.bincount(evaluated.truth.images[lost], minlength=num_images)


def difference(first: tuple[Evaluated, int], second: tuple[Evaluated, int], num_images: int) -> np.ndarray:
    """[I] how differently two runs do in each image: objects that one of them alone finds, and the difference of their
    numbers of errors.

    Args:
        first, second: a run, and the bin of the score from which its detections count.
        num_images: of the dataset.
    """
    truth, errors, is_found = first[0].truth, [], []
    for evaluated, least in (first, second):
        errors.append(number_of_errors(evaluated, least, num_images))
        counts = np.append(evaluated.bins >= least, False)
        is_found.append(counts[evaluated.matches.found_by])  # -1, nothing, is the last one
    by_one = (is_found[0] != is_found[1]) & ~truth.crowds
    return np.bincount(truth.images[by_one], minlength=num_images) + np.abs(errors[0] - errors[1])


def choose_images(badness: np.ndarray, number: int = MAX_PICTURES) -> list[int]:
    """Indices of images, the worst first: all of them, or three quarters the worst and a quarter spread over the rest.

    >>> choose_images(np.array([0, 5, 1, 2, 4, 3, 0, 0]), 4)
    [1, 4, 5, 7]
    """
    order = np.argsort(-badness, kind="stable")
    if len(order) <= number:
        return order.tolist()
    worst = round(number * SHARE_OF_WORST)
    rest = np.linspace(worst, len(order) - 1, number - worst).round().astype(int) if number - worst > 1 else [-1]
    return [*order[:worst].tolist(), *order[rest].tolist()]


def picture_data(
    runs: Sequence[Run], evaluated: Sequence[dict[Task, Evaluated]], images: Sequence[int]
) -> Iterator[dict]:
    """Pictures one after the other, with objects and with the detections of each run.

    Boxes are xywh in pixels of the file; ``mask`` is an SVG path in the same pixels. For each run and task an object
    has its :meth:`Evaluated.last_bins`, and a detection its kind, "correct" and "ignored" among them, and its score in
    ten-thousandths.

    Args:
        runs: one or two, on the same dataset.
        evaluated: of each run by its tasks.
        images: indices into the dataset.
    """
    last_bins = [{task: x.last_bins() for task, x in own.items()} for own in evaluated]
    for image in images:
        record = runs[0].dataset.records[image]
        size = (record["width"], record["height"]) if "width" in record else None
        pixels = read_image(record["file_name"], "RGB", size)
        height, width = pixels.shape[:2]
        truth = evaluated[0]["bbox"].truth
        objects = []
        for i in np.flatnonzero(truth.images == image):
            entry = {"class": int(truth.classes[i]), "box": _box(truth.boxes[i]), "crowd": bool(truth.crowds[i])}
            if truth.masks[i] is not None and any("segm" in x for x in evaluated):
                entry["mask"] = outline(truth.masks[i])
            entry["runs"] = [
                {task: [int(found[i]), int(meant[i])] for task, (found, meant) in own.items()} for own in last_bins
            ]
            objects.append(entry)
        yield {
            "file": str(record["file_name"]),
            "width": width,
            "height": height,
            "source": _jpeg(pixels),
            "objects": objects,
            "runs": [_detections(own, image) for own in evaluated],
        }


def _detections(evaluated: dict[Task, Evaluated], image: int) -> list[dict]:
    """The best of an image: a detection has ``class``, ``box``, ``mask`` and by task [kind, score]."""
    entries: dict[int, dict] = {}
    for task, own in evaluated.items():
        found, points = own.found, own.points
        shown = np.flatnonzero((found.images == image) & (own.bins >= LEAST_BIN))
        for i in shown[:MAX_DETECTIONS]:  # the best of an image come first
            if (index := int(found.indices[i])) not in entries:
                entries[index] = {"class": int(found.classes[i]), "box": _box(found.boxes[i])}
                if found.masks is not None:
                    entries[index]["mask"] = outline(found.masks[i])
            entries[index][task] = [_kind(own, i), int(points[i])]
    return list(entries.values())


def _kind(evaluated: Evaluated, i: int) -> str:
    if evaluated.matches.ignored[i]:
        return IGNORED
    return ERROR_KINDS[evaluated.errors.kinds[i]] if evaluated.errors.kinds[i] >= 0 else CORRECT


def outline(mask: dict) -> str:
    """The outlines of a compressed run-length encoding as an SVG path in pixels, holes included ("evenodd")."""
    left, top, width, height = mask_util.toBbox(mask).astype(int)
    if not width or not height:
        return ""
    part = mask_util.decode(mask)[top : top + height, left : left + width]
    # Twice as large, with a pixel around it: outlines run along the edges of pixels and not through their centres.
    part = np.pad(np.kron(part, np.ones((2, 2), np.uint8)), 1)
    tolerance = max(1.0, max(mask["size"]) / 400)
    path = []
    for contour in cv2.findContours(part, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)[0]:
        points = cv2.approxPolyDP(contour, tolerance, True)[:, 0] / 2 - 0.25 + (left, top)
        if len(points) >= 3:
            path.append("M" + "L".join(f"{x:.1f} {y:.1f}" for x, y in points) + "Z")
    return "".join(path)


def _box(box: np.ndarray) -> list[float]:
    return [round(float(x), 1) for x in box]


def _jpeg(pixels: np.ndarray) -> str:
    """[H, W, 3] RGB as a data URI, scaled down to LONG_SIDE."""
    picture = Image.fromarray(pixels)
    picture.thumbnail((LONG_SIDE, LONG_SIDE), Image.Resampling.LANCZOS)
    file = io.BytesIO()
    picture.save(file, "JPEG", quality=JPEG_QUALITY, optimize=True)
    return "data:image/jpeg;base64," + base64.b64encode(file.getvalue()).decode()
