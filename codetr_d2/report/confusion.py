"""Which class is taken for which."""

import numpy as np

from .detections import FOREGROUND_IOU, Detections, GroundTruth, Task, overlaps_by_image

__all__ = ["confusion_matrix", "objects_meant"]


def objects_meant(truth: GroundTruth, found: Detections, task: Task) -> tuple[np.ndarray, np.ndarray]:
    """Pair detections with objects, whatever their classes.

    In each image detections choose in the order of their scores, each the object that it overlaps most of those that
    are left, with an IoU of 0.5 or more. So the pairs above any score are those of the detections above it.

    Returns:
        [M] index of each detection's object, -1 for background; [M] bool, whether the detection counts for nothing: it
        has no object and lies in a crowd by half or more, or is lenient.
    """
    meant, ignored = np.full(len(found.scores), -1), found.lenient.copy()
    for detections, objects, ious in overlaps_by_image(truth, found, task):
        crowds = truth.crowds[objects]
        ignored[detections] |= (ious[:, crowds] >= FOREGROUND_IOU).any(1)
        objects, ious = objects[~crowds], np.where(ious[:, ~crowds] >= FOREGROUND_IOU, ious[:, ~crowds], -1.0)
        for d in np.flatnonzero((ious >= 0).any(1)):
            best = ious[d].argmax()
            if ious[d, best] >= 0:
                meant[detections[d]] = objects[best]
                ious[:, best] = -1.0
    return meant, ignored & (meant < 0)


def confusion_matrix(
    truth: GroundTruth, found: Detections, task: Task, score_threshold: float, num_classes: int
) -> np.ndarray:
    """[K + 1, K + 1] counts: rows are the true class, columns the class that was detected, the last ones background."""
    meant, ignored = objects_meant(truth, found, task)
    counts = (found.scores >= score_threshold) & ~ignored
    rows = np.where(meant >= 0, np.append(truth.classes, 0)[meant], num_classes)[counts]
    matrix = np.zeros((num_classes + 1, num_classes + 1), int)
    np.add.at(matrix, (rows, found.classes[counts]), 1)
    objects = np.bincount(truth.classes[~truth.crowds], minlength=num_classes)
    matrix[:num_classes, num_classes] = objects - matrix[:num_classes].sum(1)
    return matrix
