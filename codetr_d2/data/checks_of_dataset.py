"""What looks wrong with a dataset before anybody trains on it."""

from collections import defaultdict
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

import cv2
import numpy as np
from tqdm import tqdm

from ..errors import InputError
from .formats import Problem
from .images import read_image

__all__ = ["find_problems", "picture_prints", "similar_pictures"]

_OVERHANG = 1.0  # pixels that a box may stick out of its image: rounding
_SAME_OBJECT = 0.9  # IoU of boxes that are of one object twice
_DIFFERENT_BITS = 16  # of 256, at most, of pictures that are nearly identical
_DIFFERENT_LEVELS = 10.0  # of 255, on average, likewise
_DIFFERENT_LEVELS_AT_MOST = 40.0  # of 255, at any place: an object that is in one picture alone
_PRINT_SIZE = (17, 16)  # width and height: 16 x 16 comparisons of neighbours


def picture_prints(images: Sequence[dict]) -> tuple[np.ndarray, list[Problem]]:
    """Read every picture, and keep of each a small one by which similar ones are found.

    Args:
        images: of a COCO dict, with absolute ``file_name``.

    Returns:
        [N, 16, 17, 3] uint8, zeros where a picture cannot be read, and those pictures as problems.
    """

    def shrink(image: dict) -> np.ndarray | InputError:
        try:
            pixels = read_image(image["file_name"], "RGB", (image["width"], image["height"]))
        except InputError as error:
            return error
        return cv2.resize(pixels, _PRINT_SIZE, interpolation=cv2.INTER_AREA)

    prints = np.zeros((len(images), *reversed(_PRINT_SIZE), 3), dtype=np.uint8)
    problems = []
    with ThreadPoolExecutor() as pool:
        found = tqdm(pool.map(shrink, images), total=len(images), desc="Reading pictures", unit="", disable=None)
        for i, shrunk in enumerate(found):
            if isinstance(shrunk, InputError):
                problems.append(Problem("unreadable picture", str(shrunk), images[i]["id"]))
            else:
                prints[i] = shrunk
    return prints, problems


def similar_pictures(first: np.ndarray, second: np.ndarray) -> list[tuple[int, int]]:
    """Pairs of nearly identical pictures: of other sizes or qualities, perhaps a little brighter, but not moved.

    Their neighbouring pixels differ in the same directions (a difference hash), and their colours are about the same.

    Args:
        first: [N, 16, 17, 3] from :func:`picture_prints`.
        second: [M, 16, 17, 3] likewise.

    Returns:
        Pairs of an index of ``first`` and one of ``second``.
    """
    greys = [x.astype(np.float32).mean(axis=3) for x in (first, second)]
    signs = [np.where(np.diff(x, axis=2) > 0, 1, -1).reshape(len(x), -1).astype(np.float32) for x in greys]
    pairs = []
    for start in range(0, len(first), 1000):  # a block of the matrix of all pairs at a time
        different = (signs[0].shape[1] - signs[0][start : start + 1000] @ signs[1].T) / 2
        for i, j in zip(*np.nonzero(different <= _DIFFERENT_BITS)):
            levels = np.abs(first[start + i].astype(np.float32) - second[j])
            if levels.mean() <= _DIFFERENT_LEVELS and levels.max() <= _DIFFERENT_LEVELS_AT_MOST:
                pairs.append((int(start + i), int(j)))
    return pairs


def find_problems(coco: dict, splits: Sequence[str], prints: np.ndarray) -> list[Problem]:
    """What looks wrong in a dataset that was read.

    Args:
        coco: of an export.
        splits: "train", "val" or "test" of each image.
        prints: from :func:`picture_prints`.
    """
    images = {x["id"]: x for x in coco["images"]}
    of_image = defaultdict(list)
    for annotation in coco["annotations"]:
        of_image[annotation["image_id"]].append(annotation)
    names = {x["id"]: x["name"] for x in coco["categories"]}
    problems = []
    for image_id, annotations in of_image.items():
        problems += _boxes_out_of_place(images[image_id], annotations, names)
        problems += _objects_twice(image_id, annotations, names)
    return problems + _classes(coco, splits, names) + _similar(coco["images"], splits, prints)


def _boxes_out_of_place(image: dict, annotations: list[dict], names: dict) -> list[Problem]:
    problems = []
    width, height = image["width"], image["height"]
    for annotation in annotations:
        x, y, w, h = annotation["bbox"]
        if w <= 0 or h <= 0:
            kind = "box without area"
        elif x >= width or y >= height or x + w <= 0 or y + h <= 0:
            kind = "box outside of its picture"
        elif min(x, y) < -_OVERHANG or x + w > width + _OVERHANG or y + h > height + _OVERHANG:
            kind = "box that sticks out of its picture"
        else:
            continue
        place = ", ".join(f"{v:g}" for v in annotation["bbox"])
        detail = f"{names[annotation['category_id']]} [{place}] in {width} x {height} pixels"
        problems.append(Problem(kind, detail, image["id"], annotation["bbox"]))
    return problems


def _objects_twice(image_id: int, annotations: list[dict], names: dict) -> list[Problem]:
    annotations = [x for x in annotations if min(x["bbox"][2:]) > 0 and not x["iscrowd"]]
    if len(annotations) < 2:
        return []
    boxes = np.array([x["bbox"] for x in annotations], dtype=np.float64)
    first, last = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    shared = (np.minimum(last[:, None], last) - np.maximum(first[:, None], first)).clip(0).prod(axis=2)  # [N, N]
    areas = boxes[:, 2:].prod(axis=1)
    overlaps = np.triu(shared / (areas[:, None] + areas - shared), 1)
    problems = []
    for i, j in zip(*np.nonzero(overlaps >= _SAME_OBJECT)):
        one, other = (names[annotations[k]["category_id"]] for k in (i, j))
        kind = "object that is annotated twice" if one == other else "object of two classes"
        detail = f"{one} and {other}" if one != other else f"{one}"
        problems.append(
            Problem(kind, f"{detail}, overlapping by {overlaps[i, j]:.2f}", image_id, annotations[j]["bbox"])
        )
    return problems


def _classes(coco: dict, splits: Sequence[str], names: dict) -> list[Problem]:
    split_of = {image["id"]: split for image, split in zip(coco["images"], splits)}
    used = defaultdict(dict)  # by class, one of its images for each split that has it
    for annotation in coco["annotations"]:
        used[annotation["category_id"]][split_of[annotation["image_id"]]] = annotation["image_id"]
    problems = []
    by_spelling = defaultdict(list)
    for category, name in names.items():
        found = used.get(category, {})
        by_spelling["".join(x for x in name.casefold() if x.isalnum()) or name].append(name)
        if not found:
            problems.append(Problem("class without an object", name))
            continue
        for split in ("train", "val"):
            if split not in found and split in splits:
                what = "is not trained on" if split == "train" else "is not evaluated"
                there = " and ".join(sorted(found))
                detail = f"{name} {what}: it is in {there} alone"
                problems.append(Problem("class that a split lacks", detail, next(iter(found.values()))))
    problems += [
        Problem("classes that differ in their spelling alone", ", ".join(map(repr, same)))
        for same in by_spelling.values()
        if len(same) > 1
    ]
    return problems


def _short(image: dict) -> str:
    """The name of a picture with its folder's."""
    return "/".join(Path(image["file_name"]).parts[-2:])


def _similar(images: list[dict], splits: Sequence[str], prints: np.ndarray) -> list[Problem]:
    """Pictures of different splits that show the same: what is evaluated then was trained on."""
    indices = {split: np.array([i for i, x in enumerate(splits) if x == split]) for split in ("train", "val", "test")}
    problems = []
    for one, other in (("train", "val"), ("train", "test"), ("val", "test")):
        if not (len(indices[one]) and len(indices[other])):
            continue
        for i, j in similar_pictures(prints[indices[one]], prints[indices[other]]):
            first, second = images[indices[one][i]], images[indices[other][j]]
            detail = f"{_short(second)} of {other} is nearly {_short(first)} of {one}"
            problems.append(Problem("picture of two splits", detail, second["id"], other_image_id=first["id"]))
    return problems
