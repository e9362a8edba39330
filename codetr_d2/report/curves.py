"""Precision, recall and F1 by the score above which detections count."""

from dataclasses import dataclass

import numpy as np

__all__ = ["RECALLS", "ScoreCurve", "average_precision", "interpolated_precision", "score_curve"]

RECALLS = np.linspace(0, 1, 101)  # at which COCO's AP reads the precision


def interpolated_precision(scores: np.ndarray, is_true: np.ndarray, num_objects: int) -> np.ndarray:
    """The precision at each of :data:`RECALLS`: the best of this recall or more, 0 where it is never reached.

    >>> interpolated_precision(np.array([0.9, 0.8, 0.7]), np.array([True, False, True]), 2)[[0, 50, 51, 100]].round(2)
    array([1.  , 1.  , 0.67, 0.67])

    Args:
        scores: [M].
        is_true: [M] bool; whether a detection finds an object.
        num_objects: that there are to find, at least one.
    """
    true = np.cumsum(is_true[np.argsort(-scores, kind="stable")])
    precision = true / np.arange(1, len(true) + 1)
    precision = np.maximum.accumulate(precision[::-1])[::-1]
    places = np.searchsorted(true / num_objects, RECALLS, side="left")
    return np.append(precision, 0.0)[places]


def average_precision(scores: np.ndarray, is_true: np.ndarray, num_objects: int) -> float:
    """COCO's AP, between 0 and 1; NaN where there is nothing to find. Arguments as above."""
    return float(interpolated_precision(scores, is_true, num_objects).mean()) if num_objects else float("nan")


@dataclass
class ScoreCurve:
    """What holds of the detections of at least some score.

    Attributes:
        precision, recall, f1: [T] between 0 and 1, at each of T scores; a precision of no detection is NaN.
        best_score: the score with the best F1; NaN where no detection is right.
        best_f1, precision_at_best, recall_at_best: at that score.
    """

    precision: np.ndarray
    recall: np.ndarray
    f1: np.ndarray
    best_score: float
    best_f1: float
    precision_at_best: float
    recall_at_best: float


def score_curve(scores: np.ndarray, is_true: np.ndarray, num_objects: int, thresholds: np.ndarray) -> ScoreCurve:
    """Curves over ``thresholds``, and the best of all scores that detections have.

    Args:
        scores: [M].
        is_true: [M] bool; whether a detection finds an object.
        num_objects: that there are to find, at least one.
        thresholds: [T] scores at which the curves are read.
    """
    order = np.argsort(-scores, kind="stable")
    descending = scores[order]
    true = np.concatenate(([0], np.cumsum(is_true[order])))  # among the first 0, 1, ... detections
    kept = np.searchsorted(-descending, -thresholds, side="right")
    with np.errstate(invalid="ignore"):
        precision = true[kept] / kept
    f1 = 2 * true[kept] / (kept + num_objects)
    # Detections of the same score are kept or left together.
    ends = np.flatnonzero(np.diff(descending, append=-np.inf)) + 1
    all_f1 = 2 * true[ends] / (ends + num_objects)
    if not is_true.any():
        return ScoreCurve(precision, true[kept] / num_objects, f1, float("nan"), 0.0, 0.0, 0.0)
    best = ends[all_f1.argmax()]
    return ScoreCurve(
        precision,
        true[kept] / num_objects,
        f1,
        float(descending[best - 1]),
        float(all_f1.max()),
        float(true[best] / best),
        float(true[best] / num_objects),
    )
