"""Annotations of any origin -> checked dataset dicts. Everything behind (training, evaluation, drawing) reads these.

A file is read by columns: what all annotations say under one key, which is right as a whole or is searched for the
entry at fault.
"""

import logging
import math
import os
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain
from numbers import Real
from typing import Any

import numpy as np
import pycocotools.mask as mask_util
from detectron2.structures import BoxMode
from detectron2.structures.masks import polygon_area

from ..errors import InputError
from .json_file import paused_gc, read_annotation_json

__all__ = ["AnnotatedImages", "read_coco_json", "read_dataset_dicts"]

logger = logging.getLogger(__name__)

_OVERHANG = 1.0  # pixels that a box may stick out of its image without a word: rounding
_LARGEST_SHARE = 1.01  # no box of a file ends behind this: they look like shares of the image, not like pixels


@dataclass
class AnnotatedImages:
    """A dataset as it is trained and evaluated on.

    Attributes:
        source: its annotation file, or the name of a dataset that was registered by other code.
        records: one detectron2 dataset dict for each image, with ``image_id``, ``file_name``, ``height``, ``width`` and
            ``annotations``. These have ``bbox`` (four finite numbers inside the image), ``bbox_mode``, ``category_id``
            (class index from 0), ``iscrowd`` (0 or 1), ``area`` (square pixels, of the mask where there is one) and,
            where the mask is a valid one, ``segmentation``: polygons of three points or more, or a compressed
            run-length encoding.
        categories: ``id``, ``name`` and what else the file says of each class, by class index; empty where unknown.
        is_annotated: False where there are no annotations to evaluate with, as in a test set.
        maskless: for the first annotation without a valid mask, what is wrong with it; "" where all have one.
        root_categories: names of categories without annotations that are nothing but the supercategory of others.
    """

    source: str
    records: list[dict]
    categories: list[dict] = field(default_factory=list)
    is_annotated: bool = True
    maskless: str = ""
    root_categories: list[str] = field(default_factory=list)


@dataclass
class _Columns:
    """The annotations of a dataset by what they say, each list with one entry for each annotation.

    ``boxes`` is [N, 4] XYWH in pixels, and ``originals`` the same as lists of numbers. ``where(i)`` names an annotation
    in messages.
    """

    owners: list[int]  # index of the image
    boxes: np.ndarray
    originals: list
    classes: list[int]
    crowds: list[int]
    areas: np.ndarray  # NaN where not given
    segmentations: list
    where: Callable[[int], str]


def read_coco_json(path: str, file_of: Callable[[dict], str], required: Sequence[str] = ()) -> AnnotatedImages:
    """Read and check an annotation file in COCO's format. That of a test set may lack the list "annotations".

    Null is taken for missing, 1.0 and "1" for 1. What training and evaluation do not use is not looked at.

    Args:
        path: the file.
        file_of: the path of an image, from its entry in the file.
        required: keys that each image must have beside COCO's.

    Raises:
        InputError: naming the file and the entry at fault.
    """
    with paused_gc():
        data = read_annotation_json(path)
        categories = _read_categories(path, data["categories"])
        class_of = {category["id"]: i for i, category in enumerate(categories)}
        images, index_of = _read_images(path, data["images"], required)
        records = [
            {
                "file_name": file_of(image),
                **{key: image[key] for key in ("height", "width")},
                "image_id": image["id"],
                **{key: image[key] for key in ("neg_category_ids", "not_exhaustive_category_ids") if key in image},
                "annotations": [],
            }
            for image in images
        ]
        annotations = data.pop("annotations", None)
        del data, images
        if annotations is not None and not isinstance(annotations, list):
            raise InputError(f'{path}: "annotations" is no list. Its format needs images, annotations and categories.')
        dataset = AnnotatedImages(path, records, categories, is_annotated=annotations is not None)
        columns = _read_annotations(path, annotations or [], index_of, class_of)
        del annotations  # a gigabyte for COCO; its values live on in the columns
        _fill(dataset, columns)
    return dataset


def read_dataset_dicts(
    name: str, records: Iterable[dict], class_names: Sequence[str], num_classes: int = 0
) -> AnnotatedImages:
    """Check dataset dicts that other code has registered, and put them into the form of :class:`AnnotatedImages`.

    Args:
        name: of the dataset.
        records: in detectron2's format; they stay as they are.
        class_names: of the dataset, or empty where it does not name them.
        num_classes: how many classes there are where they have no names; 0: unknown.

    Raises:
        InputError: naming the dataset, the image and the key at fault.
    """
    images, owners, originals = [], [], []
    records = list(records)
    for i, record in enumerate(records):
        if not isinstance(record, dict) or not isinstance(record.get("file_name"), (str, os.PathLike)):
            raise InputError(
                f'The dataset {name!r}: record {i} has no "file_name". Register detectron2\'s dataset dicts.'
            )
        image = {**record, "file_name": os.fspath(record["file_name"])}
        for key in ("height", "width"):
            if record.get(key) is not None:
                image[key] = _whole(record[key])
                if image[key] is None or image[key] <= 0:
                    raise InputError(
                        f'The dataset {name!r}: "{key}" of {image["file_name"]} is {record[key]!r}; it must be a whole '
                        "number of pixels above 0."
                    )
            else:
                image.pop(key, None)
        annotations = record.get("annotations") or []
        owners += [i] * len(annotations)
        originals += annotations
        image["annotations"] = []
        images.append(image)
    is_annotated = any("annotations" in record for record in records)
    categories = [{"id": i, "name": str(x)} for i, x in enumerate(class_names)]
    dataset = AnnotatedImages(name, images, categories, is_annotated)
    if not images:
        raise InputError(f"The dataset {name!r} has no images, so there is nothing to read.")

    def where(i: int) -> str:
        number = i - owners.index(owners[i])
        return f"The dataset {name!r}: annotations[{number}] of {images[owners[i]]['file_name']}"

    for i, annotation in enumerate(originals):
        for key in ("bbox", "bbox_mode", "category_id"):
            if not isinstance(annotation, dict) or annotation.get(key) is None:
                hint = " (BoxMode.XYXY_ABS, or BoxMode.XYWH_ABS as in COCO)" if key == "bbox_mode" else ""
                raise InputError(f'{where(i)} has no "{key}"{hint}. Add it.')
    modes = [x["bbox_mode"] for x in originals]
    for i, mode in enumerate(modes):
        if mode not in (BoxMode.XYXY_ABS, BoxMode.XYWH_ABS):
            raise InputError(f'{where(i)}: "bbox_mode" is {mode!r}; it may be BoxMode.XYXY_ABS or BoxMode.XYWH_ABS.')
    boxes = _boxes([x["bbox"] for x in originals], where, "four numbers in pixels")
    xyxy = np.array([mode == BoxMode.XYXY_ABS for mode in modes], dtype=bool)
    boxes[xyxy, 2:] -= boxes[xyxy, :2]
    classes = _whole_numbers([x["category_id"] for x in originals])
    num_classes = len(class_names) or num_classes
    for i, index in enumerate(classes):
        if index is None or index < 0 or (num_classes and index >= num_classes):
            raise InputError(
                f'{where(i)}: "category_id" is {originals[i]["category_id"]!r}; it counts from 0'
                + (f", so it must be at most {num_classes - 1}" if num_classes else "")
                + ". Give the index of the class, not the id of a category."
            )
    columns = _Columns(
        owners,
        boxes,
        boxes.tolist(),
        classes,
        _crowds([x.get("iscrowd") for x in originals], where),
        _areas([x.get("area") for x in originals], where),
        [_as_lists(x.get("segmentation")) for x in originals],
        where,
    )
    _fill(dataset, columns)
    return dataset


def _whole(value) -> int | None:
    """A value that is a whole number, however it is written; else None."""
    if isinstance(value, str):
        try:
            value = float(value)
        except ValueError:
            return None
    if isinstance(value, np.generic):
        value = value.item()
    if isinstance(value, int):
        return int(value)
    return int(value) if isinstance(value, float) and value.is_integer() else None


def _whole_numbers(column: list) -> list[int | None]:
    return column if set(map(type, column)) <= {int} else [_whole(x) for x in column]


def _id(value) -> int | str | None:
    """An id as it is meant: 1.0 is 1, and a text stays one; None where it is neither."""
    if isinstance(value, str):
        return value if value.strip() else None
    return None if isinstance(value, bool) else _whole(value)


def _crowds(column: list, where: Callable[[int], str]) -> list[int]:
    if set(map(type, column)) <= {int, type(None), bool} and set(column) <= {0, 1, None}:
        return [int(x or 0) for x in column]
    crowds = [0 if x is None else _whole(x) for x in column]
    for i, crowd in enumerate(crowds):
        if crowd not in (0, 1):
            raise InputError(f'{where(i)}: "iscrowd" is {column[i]!r}; it must be 0 or 1.')
    return crowds


def _numbers(value: Any, shape: tuple[int, ...]) -> np.ndarray | None:
    """Numbers, which may be written as texts, as float64; None where they are none, or of another shape."""
    try:
        array = np.array(value, dtype=np.float64)
    except (ValueError, TypeError):
        return None
    return array if array.shape == shape else None


def _areas(column: list, where: Callable[[int], str]) -> np.ndarray:
    """[N] float64; NaN for those that are not given, or that no object has."""
    areas = _numbers(column, (len(column),))
    if areas is None:
        i = next(i for i, area in enumerate(column) if _numbers(area, ()) is None)
        raise InputError(f'{where(i)}: "area" is {column[i]!r}; it must be a number of square pixels, or be left out.')
    areas[~((areas > 0) & (areas < np.inf))] = np.nan
    return areas


def _boxes(column: list, where: Callable[[int], str], format: str) -> np.ndarray:
    """[N, 4] float64; a coordinate that is null is NaN."""
    boxes = _numbers(column or np.zeros((0, 4)), (len(column), 4))
    if boxes is None:
        i = next(i for i, box in enumerate(column) if _numbers(box, (4,)) is None)
        raise InputError(f'{where(i)}: "bbox" is {column[i]!r}, not {format}.')
    return boxes


def _as_lists(segmentation):
    """Polygons of arrays or tuples as lists of numbers, and a bit mask as a run-length encoding."""
    if isinstance(segmentation, np.ndarray) and segmentation.ndim == 2 and segmentation.dtype in (bool, np.uint8):
        return mask_util.encode(np.asfortranarray(segmentation.astype(bool).view(np.uint8)))
    if isinstance(segmentation, (list, tuple)) and not all(type(x) is list for x in segmentation):
        try:
            return [np.asarray(x, dtype=np.float64).ravel().tolist() for x in segmentation]
        except (ValueError, TypeError):
            return segmentation
    return segmentation


def _fill(dataset: AnnotatedImages, columns: _Columns) -> None:
    """Give the records their annotations, with usable boxes only, and say in one line what there is."""
    records, boxes = dataset.records, columns.boxes
    sizes = np.array([(x.get("width", np.inf), x.get("height", np.inf)) for x in records], dtype=np.float64)
    sizes = sizes[columns.owners] if columns.owners else np.zeros((0, 2))
    first, last = boxes[:, :2], boxes[:, :2] + boxes[:, 2:]
    inner_first, inner_last = first.clip(0), np.minimum(last, sizes)
    with np.errstate(invalid="ignore"):
        is_usable = np.isfinite(boxes).all(1) & (boxes[:, 2:] > 0).all(1) & (inner_last > inner_first).all(1)
        overhangs = is_usable & (np.maximum(inner_first - first, last - inner_last) > _OVERHANG).any(1)
    examples = {}
    for kind, chosen in (("left out", ~is_usable), ("clipped", overhangs)):
        for i in np.flatnonzero(chosen)[:1]:
            examples[kind] = f"{columns.originals[i]} in {records[columns.owners[i]]['file_name']}"
    clipped = np.concatenate((inner_first, inner_last - inner_first), axis=1)
    for i in np.flatnonzero(overhangs):
        columns.originals[i] = clipped[i].tolist()

    image_sizes = [(x["height"], x["width"]) if "height" in x and "width" in x else None for x in records]
    masks = [read_mask(x, image_sizes[i]) if x else None for x, i in zip(columns.segmentations, columns.owners)]
    areas = columns.areas
    for i in np.flatnonzero(np.isnan(areas) & is_usable):
        areas[i] = _mask_area(masks[i]) or float(columns.originals[i][2] * columns.originals[i][3])
    mode = BoxMode.XYWH_ABS
    for owner, box, category, crowd, area, mask, is_kept in zip(
        columns.owners, columns.originals, columns.classes, columns.crowds, areas.tolist(), masks, is_usable.tolist()
    ):
        if is_kept:
            annotation = {"bbox": box, "bbox_mode": mode, "category_id": category, "iscrowd": crowd, "area": area}
            if mask is not None:
                annotation["segmentation"] = mask
            records[owner]["annotations"].append(annotation)
    if None in masks:
        i = next(i for i, mask in enumerate(masks) if mask is None)
        found = "not a valid" if columns.segmentations[i] else "no"
        dataset.maskless = (
            f'{columns.where(i)} has {found} "segmentation", which {{option}} needs. Give it polygons '
            "([[x, y, x, y, x, y, ...], ...] in pixels, three points or more) or an RLE of the image's size, remove "
            "the annotation, or set {option} False."
        )
    _report(dataset, columns, is_usable, int(overhangs.sum()), examples)


def _report(dataset: AnnotatedImages, columns: _Columns, is_usable: np.ndarray, clipped: int, examples: dict) -> None:
    """Log what a dataset holds and what is left out of it, and warn of what is hardly meant."""
    if not dataset.is_annotated:
        logger.info("%s: %d images without annotations", dataset.source, len(dataset.records))
        return
    crowds = np.array(columns.crowds, dtype=bool) & is_usable
    empty = sum(not x["annotations"] for x in dataset.records)
    line = (
        f"{dataset.source}: {len(dataset.records)} images ({empty} of them without a box), "
        f"{int((is_usable & ~crowds).sum())} boxes, {int(crowds.sum())} crowds"
    )
    if crowds.any():
        line += " (not trained on, and no error where they are detected)"
    dropped = int((~is_usable).sum())
    if dropped:
        line += f"; {dropped} boxes are left out (no area, not a number, or outside their image), for example "
        line += examples["left out"]
    if clipped:
        line += f"; {clipped} that overhang their image are clipped, for example {examples['clipped']}"
    if dropped or clipped:
        line += ". Boxes are [x, y, width, height] in pixels"
    polygons = [i for i in np.flatnonzero(crowds) if isinstance(columns.segmentations[i], list)]
    if polygons:
        line += (
            f". {len(polygons)} crowds have polygons, as single objects have, like {columns.where(polygons[0])}: set "
            'their "iscrowd" to 0 if they are objects to train on'
        )
    logger.log(logging.WARNING if dropped or clipped or polygons else logging.INFO, "%s", line)

    ends = (columns.boxes[:, :2] + columns.boxes[:, 2:])[is_usable]
    if len(ends) and ends.max() <= _LARGEST_SHARE:
        logger.warning(
            "%s: no box ends behind %.3g pixels, so they look like shares of the image. Multiply them by its width and "
            "height: boxes are in pixels",
            dataset.source,
            ends.max(),
        )
    used = set(columns.classes)
    parents = {x.get("supercategory") for x in dataset.categories}
    dataset.root_categories = [
        x["name"] for i, x in enumerate(dataset.categories) if i not in used and x["name"] in parents
    ]
    for name in dataset.root_categories:
        logger.warning(
            "%s: the category %r has no annotations and is only the supercategory of others. If it is no class of its "
            'own, remove it from "categories" and count one class less',
            dataset.source,
            name,
        )
    for name, number in Counter(x["name"] for x in dataset.categories).items():
        if number > 1:
            ids = ", ".join(str(x["id"]) for x in dataset.categories if x["name"] == name)
            logger.warning("%s: %d categories are called %r (ids %s)", dataset.source, number, name, ids)


def _mask_area(mask: list | dict | None) -> float:
    """In square pixels; 0 without a mask."""
    if isinstance(mask, dict):
        return float(mask_util.area(mask))
    return float(sum(polygon_area(np.array(x[0::2]), np.array(x[1::2])) for x in mask or ()))


def _read_categories(path: str, categories: list) -> list[dict]:
    """The categories in the order of their ids, as class indices count."""
    read = []
    for i, category in enumerate(categories):
        where = f"{path}: categories[{i}]"
        if not isinstance(category, dict) or _id(category.get("id")) is None or category.get("name") is None:
            raise InputError(f'{where} needs an integer "id" and a "name", but is {category!r}.')
        read.append({**category, "id": _id(category["id"]), "name": str(category["name"])})
    if not read:
        raise InputError(f'{path}: "categories" is empty. List the classes with their ids and names.')
    numbers = [_whole(x["id"]) for x in read]
    if any(isinstance(x["id"], str) for x in read) and None not in numbers:
        read = [{**x, "id": number} for x, number in zip(read, numbers)]
    first = {}
    for i, category in enumerate(read):
        if category["id"] in first:
            raise InputError(
                f"{path}: categories[{i}] has the id {category['id']} of an earlier category. Give each an id of its "
                "own."
            )
        first[category["id"]] = i
    return sorted(read, key=lambda x: (isinstance(x["id"], str), x["id"]))


def _read_images(path: str, images: list, required: Sequence[str]) -> tuple[list[dict], dict]:
    """The images with their numbers as numbers, and the index of each by its id."""
    keys = ("id", "file_name", "width", "height") if "coco_url" not in required else ("id", "width", "height")
    read, index_of = [], {}
    for i, image in enumerate(images):
        where = f"{path}: images[{i}]"
        is_object = isinstance(image, dict)
        missing = [x for x in (*keys, *required) if image.get(x) is None] if is_object else []
        if missing or not is_object:
            raise InputError(f"{where} lacks {', '.join(missing) or 'its keys'}. Add what is missing: {image!r}.")
        width, height, number = image["width"], image["height"], image["id"]
        if not (type(width) is type(height) is type(number) is int and width > 0 < height):
            number, width, height = _id(number), _whole(width), _whole(height)
            if number is None:
                raise InputError(f'{where}: "id" must be a whole number or a text, not {image["id"]!r}.')
            if width is None or height is None or min(width, height) <= 0:
                raise InputError(
                    f'{where} ({image.get("file_name", number)}): "width" and "height" must be whole numbers of pixels '
                    f"above 0, not {image['width']!r} and {image['height']!r}."
                )
            image = {**image, "id": number, "width": width, "height": height}
        for key in ("file_name", "coco_url"):
            if key in (*keys, *required) and not isinstance(image[key], str):
                raise InputError(f'{where}: "{key}" must be a text, not {image[key]!r}.')
        if number in index_of:
            raise InputError(
                f"{where} ({image.get('file_name', number)}) has the id {number!r} of an earlier image. Give each an "
                "id of its own."
            )
        index_of[number] = i
        read.append(image)
    if not read:
        raise InputError(f'{path}: "images" is empty, so there is nothing to read.')
    return read, index_of


def _find(column: list, index_of: dict) -> tuple[list, int | None]:
    """The index of each id, and the position of the first that is not known. "1" finds 1, and 1 "1"."""
    try:
        found = list(map(index_of.get, column))
    except TypeError:  # a list or an object in the place of an id
        found = [index_of.get(_id(x)) for x in column]
    if None in found:
        by_text = {str(key): index for key, index in index_of.items()}
        for i, index in enumerate(found):
            if index is None:
                found[i] = by_text.get(str(_id(column[i]))) if column[i] is not None else None
                if found[i] is None:
                    return found, i
    return found, None


def _read_annotations(path: str, annotations: list, index_of: dict, class_of: dict) -> _Columns:
    def where(i: int) -> str:
        return f"{path}: annotations[{i}] (id {annotation_ids[i]})"

    for i, annotation in enumerate(annotations):
        if not isinstance(annotation, dict):
            raise InputError(f"{path}: annotations[{i}] is {annotation!r}, not an object.")
    annotation_ids, images, categories, boxes, crowds, areas, segmentations, ignored = (
        [x.get(key) for x in annotations]
        for key in ("id", "image_id", "category_id", "bbox", "iscrowd", "area", "segmentation", "ignore")
    )
    required = {"id": annotation_ids, "image_id": images, "category_id": categories, "bbox": boxes}
    lacking = [column.index(None) for column in required.values() if None in column]
    if lacking:
        i = min(lacking)
        missing = ", ".join(key for key, column in required.items() if column[i] is None)
        raise InputError(f"{path}: annotations[{i}] lacks {missing}. Add what is missing or remove it.")
    if not set(map(type, annotation_ids)) <= {int}:
        for i, value in enumerate(annotation_ids):
            if _id(value) is None:
                raise InputError(f'{path}: annotations[{i}]: "id" is {value!r}; it must be a whole number or a text.')
        annotation_ids = [_id(x) for x in annotation_ids]
    if len(set(annotation_ids)) < len(annotation_ids):
        seen = set()
        i = next(i for i, x in enumerate(annotation_ids) if x in seen or seen.add(x))
        raise InputError(
            f'{path}: annotations[{i}]: "id" is {annotation_ids[i]!r}, as of an earlier annotation. Give each '
            "annotation an id of its own."
        )
    owners, faulty = _find(images, index_of)
    if faulty is not None:
        raise InputError(
            f'{where(faulty)}: image_id {images[faulty]!r} is not the id of any entry of "images". '
            "Correct it, add the image, or remove the annotation."
        )
    classes, faulty = _find(categories, class_of)
    if faulty is not None:
        raise InputError(
            f'{where(faulty)}: category_id {categories[faulty]!r} is not the id of any entry of "categories" '
            f"({', '.join(map(str, list(class_of)[:10]))}{', ...' if len(class_of) > 10 else ''}). "
            "Correct it or add the category."
        )
    if set(map(type, ignored)) != {type(None)}:
        for i, value in enumerate(ignored):
            if value is not None and _whole(value) != 0:
                raise InputError(f'{where(i)}: "ignore" is not supported. Use "iscrowd": 1, or remove the annotation.')
    array = _boxes(boxes, where, "[x, y, width, height] in pixels")
    if not set(map(type, chain.from_iterable(boxes))) <= {int, float}:  # numbers that are written as texts
        boxes = array.tolist()
    return _Columns(
        owners,
        array,
        boxes,
        classes,
        _crowds(crowds, where),
        _areas(areas, where),
        segmentations,
        where,
    )


def read_mask(segmentation, size: tuple[int, int] | None) -> list | dict | None:
    """The valid part of what stands for a mask: polygons, or a compressed run-length encoding; None without any."""
    if isinstance(segmentation, list):
        try:
            if segmentation and isinstance(segmentation[0], Real):
                segmentation = [segmentation]
            polygons = [x for x in segmentation if len(x) >= 6 and len(x) % 2 == 0 and math.isfinite(sum(x))]
        except TypeError:  # something else among the numbers
            return read_mask([x for x in segmentation if _is_polygon(x)], size)
        return (segmentation if len(polygons) == len(segmentation) else polygons) or None  # mostly: no list more
    if isinstance(segmentation, dict) and size is not None:
        try:
            counts, own_size = segmentation["counts"], [_whole(x) for x in segmentation["size"]]
            if own_size != list(size):
                return None
            if isinstance(counts, list):
                if sum(counts) != size[0] * size[1] or min(counts) < 0:
                    return None
                return mask_util.frPyObjects({"counts": counts, "size": own_size}, *size)
            mask = {"counts": counts, "size": own_size}
            return mask if 0 < mask_util.area(mask) <= size[0] * size[1] else None
        except Exception:  # pycocotools raises nearly any error for what is no encoding
            return None
    return None


def _is_polygon(value) -> bool:
    return isinstance(value, list) and all(isinstance(x, Real) and not isinstance(x, bool) for x in value)
