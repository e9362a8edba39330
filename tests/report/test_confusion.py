"""By hand."""

import numpy as np

from codetr_d2.report.confusion import confusion_matrix, confusion_pairs
from codetr_d2.report.detections import Detections, GroundTruth


def make():
    """Two pictures; class 2 is a crowd in the second."""
    truth = GroundTruth(
        images=np.array([0, 0, 1, 1]),
        classes=np.array([0, 1, 1, 2]),
        boxes=np.array([[0, 0, 20, 20], [40, 0, 20, 20], [0, 0, 20, 20], [50, 50, 50, 50]], float),
        crowds=np.array([False, False, False, True]),
        masks=[None] * 4,
    )
    found = Detections(
        images=np.array([0, 0, 0, 0, 1, 1]),
        classes=np.array([1, 0, 1, 0, 0, 2]),
        boxes=np.array(
            [
                [0, 1, 20, 20],  # class 0 taken for 1, but for the next one, which fits better
                [0, 0, 20, 20],
                [40, 2, 20, 20],
                [80, 80, 10, 10],  # nothing
                [0, 0, 20, 18],  # class 1 taken for 0
                [60, 60, 10, 10],  # in the crowd
            ],
            float,
        ),
        scores=np.array([0.9, 0.4, 0.8, 0.7, 0.6, 0.5]),
        masks=None,
        lenient=np.zeros(6, bool),
    )
    return truth, found


def test_each_object_and_detection_counts_once():
    truth, found = make()
    expected = [[1, 0, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [1, 1, 0, 0]]
    assert confusion_matrix(truth, found, "bbox", 0.3, 3).tolist() == expected
    pairs = sorted(map(tuple, confusion_pairs(truth, found, "bbox", 0.3).tolist()))
    assert pairs == [(-1, 0), (-1, 3), (0, 1), (1, 2), (2, 4)]


def test_detections_below_the_score_do_not_count():
    truth, found = make()
    assert confusion_matrix(truth, found, "bbox", 0.45, 3)[0].tolist() == [0, 1, 0, 0]
    nothing = confusion_matrix(truth, found, "bbox", 0.95, 3)
    assert nothing[:, 3].tolist() == [1, 2, 0, 0] and nothing.sum() == 3
