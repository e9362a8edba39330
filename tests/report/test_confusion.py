"""By hand."""

import numpy as np

from codetr_d2.report.confusion import confusion_matrix, objects_meant
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
                [0, 1, 20, 20],  # class 0 taken for 1
                [0, 0, 20, 20],  # the same object, which is taken
                [40, 2, 20, 20],
                [80, 80, 10, 10],  # nothing
                [0, 0, 20, 18],  # class 1 taken for 0
                [60, 60, 10, 10],  # in the crowd
            ],
            float,
        ),
        scores=np.array([0.9, 0.4, 0.8, 0.7, 0.6, 0.5]),
        masks=None,
        indices=np.arange(6),
        lenient=np.zeros(6, bool),
    )
    return truth, found


def test_each_object_and_detection_counts_once():
    truth, found = make()
    expected = [[0, 1, 0, 0], [1, 1, 0, 0], [0, 0, 0, 0], [2, 0, 0, 0]]
    assert confusion_matrix(truth, found, "bbox", 0.3, 3).tolist() == expected
    meant, ignored = objects_meant(truth, found, "bbox")
    assert meant.tolist() == [0, -1, 1, -1, 2, -1] and ignored.tolist() == [False] * 5 + [True]


def test_detections_below_the_score_do_not_count():
    truth, found = make()
    expected = [[0, 1, 0, 0], [0, 1, 0, 1], [0, 0, 0, 0], [1, 0, 0, 0]]
    assert confusion_matrix(truth, found, "bbox", 0.65, 3).tolist() == expected
    nothing = confusion_matrix(truth, found, "bbox", 0.95, 3)
    assert nothing[:, 3].tolist() == [1, 2, 0, 0] and nothing.sum() == 3


def test_lower_scores_change_no_pair(case):
    """The matrix above a score is that of the detections above it alone."""
    _, _, dataset, results = case
    truth = GroundTruth.of(dataset)
    for score in (0.3, 0.7):
        above = Detections.of(dataset, [x for x in results if x["score"] >= score], "bbox", "coco")
        found = Detections.of(dataset, results, "bbox", "coco")
        expected = confusion_matrix(truth, above, "bbox", 0, 4)
        assert (confusion_matrix(truth, found, "bbox", score, 4) == expected).all()
        assert expected[:3, :3].sum() > 10
