"""What kind of error each detection is, and what each kind costs: Bolya et al., "TIDE: A General Toolbox for
Identifying Object Detection Errors", ECCV 2020, sections 2.2 and 2.3.
"""

from dataclasses import dataclass

import numpy as np

from .curves import average_precision
from .detections import FOREGROUND_IOU, Detections, GroundTruth, Matches, Task, overlaps_by_image

__all__ = ["BACKGROUND_IOU", "ERROR_KINDS", "MISSED", "Errors", "ap_without_each_kind", "find_errors", "mean_ap"]

BACKGROUND_IOU = 0.1  # a detection that overlaps with no object as much shows background
ERROR_KINDS = ("class", "location", "both", "duplicate", "background", "missed")
CLASS, LOCATION, BOTH, DUPLICATE, BACKGROUND, MISSED = range(6)


@dataclass
class Errors:
    """Errors of detections, and objects that were not found.

    Attributes:
        kinds: [M] index into :data:`ERROR_KINDS` for each detection, -1 where it is right or ignored.
        meant: [M] the object that a detection of kind class or location should have found, -1 otherwise.
        missed: [N] bool; an object that is no crowd, that no detection finds, and that no error of class or location
            means.
    """

    kinds: np.ndarray
    meant: np.ndarray
    missed: np.ndarray


def find_errors(truth: GroundTruth, found: Detections, task: Task, matches: Matches) -> Errors:
    """Tell the errors of the detections that ``matches`` (at an IoU of 0.5) leaves without an object.

    The first kind that fits is taken, of the greatest overlaps IoU of a detection:

    * location: 0.1 <= IoU < 0.5 with an object of its class;
    * class: IoU >= 0.5 with an object of another class;
    * duplicate: IoU >= 0.5 with an object of its class, which a better detection has found;
    * background: IoU <= 0.1 with every object;
    * both: what is left, 0.1 < IoU < 0.5 with an object of another class.
    """
    kinds, meant = np.full(len(found.scores), -1), np.full(len(found.scores), -1)
    wrong = (matches.truth_of < 0) & ~matches.ignored
    for detections, objects, ious in overlaps_by_image(truth, found, task):
        ious, objects = ious[:, ~truth.crowds[objects]], objects[~truth.crowds[objects]]
        same = found.classes[detections][:, None] == truth.classes[objects]
        of_class, of_others = np.where(same, ious, -1.0), np.where(same, -1.0, ious)
        best_of_class, best_of_others = of_class.max(1, initial=-1.0), of_others.max(1, initial=-1.0)
        for d in np.flatnonzero(wrong[detections]):
            i = detections[d]
            if BACKGROUND_IOU <= best_of_class[d] < FOREGROUND_IOU:
                kinds[i], meant[i] = LOCATION, objects[of_class[d].argmax()]
            elif best_of_others[d] >= FOREGROUND_IOU:
                kinds[i], meant[i] = CLASS, objects[of_others[d].argmax()]
            elif best_of_class[d] >= FOREGROUND_IOU:
                kinds[i] = DUPLICATE
            else:
                kinds[i] = BACKGROUND if best_of_others[d] <= BACKGROUND_IOU else BOTH
    missed = ~truth.crowds & (matches.found_by < 0)
    missed[meant[meant >= 0]] = False
    return Errors(kinds, meant, missed)


def mean_ap(scores: np.ndarray, classes: np.ndarray, is_true: np.ndarray, num_objects: np.ndarray) -> float:
    """The mean AP at the IoU of the matches, in percent, over the classes that have objects; NaN without any.

    Args:
        scores, classes, is_true: [M] of the detections that count.
        num_objects: [K] of each class.
    """
    each = [
        average_precision(scores[classes == k], is_true[classes == k], num_objects[k])
        for k in np.flatnonzero(num_objects > 0)
    ]
    return float(np.mean(each)) * 100 if each else float("nan")


def ap_without_each_kind(
    truth: GroundTruth, found: Detections, matches: Matches, errors: Errors, num_classes: int
) -> tuple[float, dict[str, float]]:
    """The AP50, and what it would be if one kind of error did not exist, in percent.

    Errors of class and location are mended: their detection finds the object that it meant, in that object's class.
    Where the object is found already, or a better detection means it too, the detection is left out. Detections of the
    other kinds are left out, and missed objects are not counted.

    Returns:
        The AP, and by the name of each kind the AP without it.
    """
    counted = ~matches.ignored
    num_objects = np.bincount(truth.classes[~truth.crowds], minlength=num_classes)
    scores, classes, is_true = found.scores, found.classes, matches.is_true
    without = {}
    for kind, name in enumerate(ERROR_KINDS):
        kept, mended_classes, mended = counted.copy(), classes.copy(), is_true.copy()
        objects = num_objects
        if kind == MISSED:
            objects = num_objects - np.bincount(truth.classes[errors.missed], minlength=num_classes)
        elif kind in (CLASS, LOCATION):
            taken = matches.found_by >= 0
            of_kind = np.flatnonzero(errors.kinds == kind)
            for i in of_kind[np.argsort(-scores[of_kind], kind="stable")]:
                meant = errors.meant[i]
                kept[i] = mended[i] = not taken[meant]
                mended_classes[i] = truth.classes[meant]
                taken[meant] = True
        else:
            kept &= errors.kinds != kind
        without[name] = mean_ap(scores[kept], mended_classes[kept], mended[kept], objects)
    return mean_ap(scores[counted], classes[counted], is_true[counted], num_objects), without
