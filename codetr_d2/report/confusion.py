"""Which class is taken for which."""

import numpy as np

from .detections import FOREGROUND_IOU, Detections, GroundTruth, Task, overlaps_by_image

__all__ = ["confusion_pairs", "confusion_matrix"]


def confusion_pairs(truth: GroundTruth, found: Detections, task: Task, score_threshold: float) -> np.ndarray:
    """Pair objects with detections of at least a score, whatever their classes.

    In each image, of all pairs with an IoU of 0.5 or more the one with the greatest is taken, then the greatest of
    those that are left, and so on. Crowds are left out; so are detections without a partner that lie in a crowd by half
    or more, or are lenient.

    Returns:
        [P, 2] index of the object and of the detection, -1 where one has no partner.
    """
    pairs = []
    partnered, in_crowd = np.zeros(len(truth.images), bool), found.lenient.copy()
    has_partner = np.zeros(len(found.scores), bool)
    for detections, objects, ious in overlaps_by_image(truth, found, task):
        crowds = truth.crowds[objects]
        in_crowd[detections] |= (ious[:, crowds] >= FOREGROUND_IOU).any(1)
        detections, ious = (x[found.scores[detections] >= score_threshold] for x in (detections, ious))
        objects, ious = objects[~crowds], ious[:, ~crowds]
        rows, columns = np.nonzero(ious >= FOREGROUND_IOU)
        for i in np.argsort(-ious[rows, columns], kind="stable"):
            detection, target = detections[rows[i]], objects[columns[i]]
            if not (has_partner[detection] or partnered[target]):
                has_partner[detection] = partnered[target] = True
                pairs.append((target, detection))
    pairs += [(i, -1) for i in np.flatnonzero(~partnered & ~truth.crowds)]
    lonely = (found.scores >= score_threshold) & ~has_partner & ~in_crowd
    pairs += [(-1, i) for i in np.flatnonzero(lonely)]
    return np.array(pairs, int).reshape(-1, 2)


def confusion_matrix(
    truth: GroundTruth, found: Detections, task: Task, score_threshold: float, num_classes: int
) -> np.ndarray:
    """[K + 1, K + 1] counts: rows are the true class, columns the class that was detected, the last ones background."""
    objects, detections = confusion_pairs(truth, found, task, score_threshold).T
    rows = np.where(objects >= 0, np.append(truth.classes, 0)[objects], num_classes)
    columns = np.where(detections >= 0, np.append(found.classes, 0)[detections], num_classes)
    matrix = np.zeros((num_classes + 1, num_classes + 1), int)
    np.add.at(matrix, (rows, columns), 1)
    return matrix
