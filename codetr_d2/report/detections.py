"""Ground truth and detections as arrays, and which detection finds which object, by COCO's rules."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np
from detectron2.structures import BoxMode
from pycocotools import mask as mask_util

from ..data.annotations import AnnotatedImages
from ..evaluation.evaluator import MAX_DETECTIONS, Style

__all__ = ["FOREGROUND_IOU", "Detections", "GroundTruth", "Matches", "Task", "find_matches", "overlaps_by_image"]

Task = Literal["bbox", "segm"]
FOREGROUND_IOU = 0.5  # least overlap of a detection with an object that it finds


@dataclass
class GroundTruth:
    """The objects of a dataset, in the order of its images.

    Attributes:
        images: [N] index of each object's image in the dataset.
        classes: [N] class indices.
        boxes: [N, 4] xywh in pixels.
        crowds: [N] bool; a crowd need not be found, and what lies in it is no error.
        masks: N compressed run-length encodings, None for an object without one.
    """

    images: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray
    crowds: np.ndarray
    masks: list[dict | None]

    @classmethod
    def of(cls, dataset: AnnotatedImages) -> "GroundTruth":
        """The objects of a dataset as it is evaluated on."""
        owned = [(i, record, x) for i, record in enumerate(dataset.records) for x in record["annotations"]]
        boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYWH_ABS) for _, _, x in owned]
        return cls(
            images=np.array([i for i, _, _ in owned], int),
            classes=np.array([x["category_id"] for _, _, x in owned], int),
            boxes=np.array(boxes, np.float64).reshape(-1, 4),
            crowds=np.array([x.get("iscrowd", 0) for _, _, x in owned], bool),
            masks=[_encoded(x.get("segmentation"), record) for _, record, x in owned],
        )


@dataclass
class Detections:
    """Detections of the images of a dataset, ordered by image.

    Attributes:
        images: [M] index of each detection's image in the dataset.
        classes: [M] class indices.
        boxes: [M, 4] xywh in pixels.
        scores: [M] between 0 and 1.
        masks: M compressed run-length encodings, or None where the model has no masks.
        indices: [M] place of each in the results that they were made of.
        lenient: [M] bool; one that finds nothing is no error (LVIS, where a class is not annotated exhaustively).
    """

    images: np.ndarray
    classes: np.ndarray
    boxes: np.ndarray
    scores: np.ndarray
    masks: list[dict] | None
    indices: np.ndarray
    lenient: np.ndarray

    @classmethod
    def of(cls, dataset: AnnotatedImages, results: Sequence[dict], task: Task, style: Style) -> "Detections":
        """Those detections that count: the best of each image (and with COCO's style of each class), as in the AP.

        Args:
            dataset: the ground truth.
            results: detections in COCO's format of results, with the dataset's image ids and class indices as
                ``category_id``.
            task: "segm" ranks by ``mask_score`` where there is one.
            style: "lvis" leaves out detections of classes that the image is not annotated with.
        """
        index_of = {x["image_id"]: i for i, x in enumerate(dataset.records)}
        images = np.array([index_of[x["image_id"]] for x in results], int)
        classes = np.array([x["category_id"] for x in results], int)
        score = "mask_score" if task == "segm" else "score"
        scores = np.array([x.get(score, x["score"]) for x in results], np.float64)
        counts, lenient = np.ones(len(results), bool), np.zeros(len(results), bool)
        if style == "lvis":
            known, unsure = _annotated_classes(dataset)
            counts = np.array([c in known[i] for i, c in zip(images, classes)], bool)
            lenient = np.array([c in unsure[i] for i, c in zip(images, classes)], bool)
        groups = images if style == "lvis" else images * (classes.max(initial=0) + 1) + classes
        best = np.concatenate([x[: MAX_DETECTIONS[style]] for x in _by_group(groups, scores)] or [np.zeros(0, int)])
        order = best[np.lexsort((-scores[best], images[best]))]
        order = order[counts[order]]
        has_masks = any("segmentation" in x for x in results)
        return cls(
            images=images[order],
            classes=classes[order],
            boxes=np.array([results[i]["bbox"] for i in order], np.float64).reshape(-1, 4),
            scores=scores[order],
            masks=[results[i]["segmentation"] for i in order] if has_masks else None,
            indices=order,
            lenient=lenient[order],
        )


@dataclass
class Matches:
    """Which detection finds which object.

    Attributes:
        truth_of: [M] for each detection the index of the object that it finds, -1 for none.
        ignored: [M] bool; the detection is neither right nor wrong: it lies in a crowd, or is lenient.
        found_by: [N] for each object the index of the detection that finds it, -1 for none.
    """

    truth_of: np.ndarray
    ignored: np.ndarray
    found_by: np.ndarray

    @property
    def is_true(self) -> np.ndarray:
        """[M] bool: the detection finds an object that is no crowd."""
        return (self.truth_of >= 0) & ~self.ignored


def overlaps_by_image(
    truth: GroundTruth, found: Detections, task: Task
) -> Iterator[tuple[np.ndarray, np.ndarray, np.ndarray]]:
    """For each image with detections: their indices [D], best first, those of its objects [G], and IoUs [D, G].

    As COCO's, that with a crowd is the share of the detection which lies in it. Objects without a mask overlap with
    no mask.
    """
    truth_of, found_of = _by_image(truth.images), _by_image(found.images)
    nothing = np.zeros(0, int)
    for image, detections in found_of.items():
        detections = detections[np.argsort(-found.scores[detections], kind="stable")]
        objects = truth_of.get(image, nothing)
        ious = np.zeros((len(detections), len(objects)))
        if task == "bbox":
            with_shape, others = objects, truth.boxes[objects].tolist()
            own = found.boxes[detections].tolist()
        else:
            with_shape = np.array([i for i in objects if truth.masks[i] is not None], int)
            own, others = [found.masks[i] for i in detections], [truth.masks[i] for i in with_shape]
        if len(with_shape):
            ious[:, np.isin(objects, with_shape)] = mask_util.iou(
                own, others, truth.crowds[with_shape].astype(np.uint8).tolist()
            )
        yield detections, objects, ious


def find_matches(truth: GroundTruth, found: Detections, task: Task, iou_threshold: float = FOREGROUND_IOU) -> Matches:
    """Match the detections of each class, best score first, each with the object that it overlaps most.

    As in COCO's evaluation, an object is found once, but a crowd as often as may be. Detections of lower scores never
    change the matches of those above them, so that the matches above any score are those of the detections above it.
    """
    matches = Matches(np.full(len(found.scores), -1), np.zeros(len(found.scores), bool), np.full(len(truth.images), -1))
    for detections, objects, ious in overlaps_by_image(truth, found, task):
        same = found.classes[detections][:, None] == truth.classes[objects]
        candidates = np.where(same & (ious >= min(iou_threshold, 1 - 1e-10)), ious, -1.0)
        crowds = truth.crowds[objects]
        free = np.ones(len(objects), bool)
        for d in np.flatnonzero((candidates >= 0).any(1)):
            for eligible in (free & ~crowds, crowds):
                row = np.where(eligible, candidates[d], -1.0)
                if row.max() >= 0:
                    best = len(row) - 1 - row[::-1].argmax()  # of equal ones the last, as COCO takes it
                    matches.truth_of[detections[d]] = objects[best]
                    matches.ignored[detections[d]] = crowds[best]
                    if not crowds[best]:
                        free[best] = False
                        matches.found_by[objects[best]] = detections[d]
                    break
    matches.ignored |= found.lenient & (matches.truth_of < 0)
    return matches


def _encoded(mask: list | dict | None, record: dict) -> dict | None:
    """A mask of a dataset dict as a compressed run-length encoding; None where there is none."""
    if mask is None or "height" not in record:
        return None
    if isinstance(mask, list):
        return mask_util.merge(mask_util.frPyObjects(mask, record["height"], record["width"]))
    return mask


def _annotated_classes(dataset: AnnotatedImages) -> tuple[list[set[int]], list[set[int]]]:
    """LVIS: for each image the classes that count in it, and those that are not annotated exhaustively."""
    index_of = {x["id"]: i for i, x in enumerate(dataset.categories)}
    known, unsure = [], []
    for record in dataset.records:
        present = {x["category_id"] for x in record["annotations"]}
        known.append(present | {index_of[x] for x in record.get("neg_category_ids", []) if x in index_of})
        unsure.append({index_of[x] for x in record.get("not_exhaustive_category_ids", []) if x in index_of})
    return known, unsure


def _by_group(groups: np.ndarray, scores: np.ndarray) -> list[np.ndarray]:
    """The indices of each group, best score first."""
    if not len(groups):
        return []
    order = np.lexsort((np.arange(len(groups)), -scores, groups))
    return np.split(order, np.flatnonzero(np.diff(groups[order])) + 1)


def _by_image(images: np.ndarray) -> dict[int, np.ndarray]:
    return {int(images[x[0]]): np.sort(x) for x in _by_group(images, np.zeros(len(images)))}
