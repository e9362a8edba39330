"""Against scikit-learn, and by hand."""

import doctest
import math

import numpy as np
import pytest
from sklearn.metrics import precision_recall_curve

from codetr_d2.report import curves
from codetr_d2.report.curves import average_precision, score_curve

THRESHOLDS = np.linspace(0, 1, 21)


@pytest.mark.parametrize("seed", range(3))
def test_curves_are_those_of_scikit_learn(seed):
    """Scores are rounded, so that many are equal."""
    rng = np.random.default_rng(seed)
    scores, is_true = rng.random(60).round(1), rng.random(60) < 0.4
    curve = score_curve(scores, is_true, int(is_true.sum()), THRESHOLDS)
    precision, recall, levels = precision_recall_curve(is_true, scores)
    f1 = 2 * precision * recall / np.maximum(precision + recall, 1e-12)
    best = f1[:-1].argmax()
    assert curve.best_f1 == pytest.approx(f1[best])
    at = score_curve(scores, is_true, int(is_true.sum()), levels)
    np.testing.assert_allclose(at.precision, precision[:-1])
    np.testing.assert_allclose(at.recall, recall[:-1])
    assert at.f1[levels == curve.best_score][0] == pytest.approx(f1[best])
    assert (curve.precision_at_best, curve.recall_at_best) == pytest.approx((precision[best], recall[best]))


def test_recall_counts_objects_without_any_detection():
    curve = score_curve(np.array([0.9, 0.5]), np.array([True, True]), 4, np.array([0.0, 0.6, 0.95]))
    assert curve.recall.tolist() == [0.5, 0.25, 0.0]
    assert curve.precision[:2].tolist() == [1.0, 1.0] and math.isnan(curve.precision[2])
    assert curve.f1 == pytest.approx([4 / 6, 2 / 5, 0])
    assert (curve.best_score, curve.best_f1) == pytest.approx((0.5, 4 / 6))


def test_no_detection_is_right():
    for scores in (np.array([]), np.array([0.7])):
        curve = score_curve(scores, np.zeros(len(scores), bool), 3, THRESHOLDS)
        assert math.isnan(curve.best_score) and curve.best_f1 == 0 and curve.f1.tolist() == [0.0] * 21
        assert average_precision(scores, np.zeros(len(scores), bool), 3) == 0
    assert math.isnan(average_precision(np.array([0.5]), np.array([False]), 0))


def test_examples():
    assert doctest.testmod(curves).failed == 0 and doctest.testmod(curves).attempted
