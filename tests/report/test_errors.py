"""Errors by hand, and by the paper's definitions written as loops."""

import numpy as np
import pytest
import torch
from torchvision.ops import box_convert, box_iou

from codetr_d2.report.detections import Detections, GroundTruth, find_matches
from codetr_d2.report.errors import ERROR_KINDS, ap_without_each_kind, find_errors


def truth_of(*objects):
    """(class, x, y, w, h) of each object of one picture."""
    rows = np.array(objects, float).reshape(-1, 5)
    number = len(rows)
    return GroundTruth(
        np.zeros(number, int), rows[:, 0].astype(int), rows[:, 1:], np.zeros(number, bool), [None] * number
    )


def found_of(*detections):
    """(class, score, x, y, w, h) of each detection of it."""
    rows = np.array(detections, float).reshape(-1, 6)
    images, indices = np.zeros(len(rows), int), np.arange(len(rows))
    return Detections(images, rows[:, 0].astype(int), rows[:, 2:], rows[:, 1], None, indices, images.astype(bool))


def evaluate(truth, found, num_classes):
    matches = find_matches(truth, found, "bbox")
    errors = find_errors(truth, found, "bbox", matches)
    ap, without = ap_without_each_kind(truth, found, matches, errors, num_classes)
    return [ERROR_KINDS[k] if k >= 0 else "" for k in errors.kinds], errors, ap, without


def test_one_error_of_each_kind():
    truth = truth_of(
        (0, 0, 0, 20, 20),
        (0, 100, 0, 20, 20),
        (1, 0, 100, 20, 20),
        (1, 100, 100, 20, 20),
        (1, 200, 200, 20, 20),
    )
    found = found_of(
        (0, 0.9, 0, 0, 20, 20),  # right
        (0, 0.8, 0, 1, 20, 20),  # the same object once more
        (0, 0.7, 110, 0, 20, 20),  # a third of the union
        (0, 0.6, 0, 100, 20, 20),  # an object of class 1
        (0, 0.5, 110, 100, 20, 20),  # next to an object of class 1
        (1, 0.4, 300, 300, 20, 20),  # nothing
    )
    kinds, errors, ap, without = evaluate(truth, found, 2)
    assert kinds == ["", "duplicate", "location", "class", "both", "background"]
    assert errors.meant.tolist() == [-1, -1, 1, 2, -1, -1]
    assert errors.missed.tolist() == [False, False, False, True, True]
    # Class 0 has two objects, of which one is found, first of all: precision 1 at the 51 recalls up to 0.5. Class 1: 0.
    half, third = 51 / 101, 34 / 101
    assert ap == pytest.approx(100 * half / 2)
    expected = {
        "duplicate": half / 2,  # the wrong ones come after the right one anyway
        "both": half / 2,
        "background": half / 2,
        # Class 0: right, wrong, right: above recall 0.5 the precision is 2/3.
        "location": (half + 50 / 101 * 2 / 3) / 2,
        # Class 1 has three objects, of which one is found, first of all: 34 recalls up to a third.
        "class": (half + third) / 2,
        "missed": half / 2,
    }
    assert without == pytest.approx({k: 100 * v for k, v in expected.items()})


def test_what_stands_before_a_right_detection_costs():
    truth = truth_of((0, 0, 0, 20, 20))
    for box, kind in (((300, 300, 20, 20), "background"), ((5, 5, 30, 30), "location")):
        kinds, _, ap, without = evaluate(truth, found_of((0, 0.9, *box), (0, 0.8, 0, 0, 20, 20)), 1)
        assert kinds == [kind, ""] and ap == pytest.approx(50)
        # An object is found already, so that the detection that means it is left out.
        assert without[kind] == pytest.approx(100)
        assert all(without[x] == pytest.approx(50) for x in ERROR_KINDS if x != kind)


def test_only_the_best_of_two_errors_is_mended():
    """The second means the same object, and is left out: the other object stays lost."""
    truth = truth_of((0, 0, 0, 20, 20), (0, 100, 0, 20, 20))
    found = found_of((0, 0.9, 10, 0, 20, 20), (0, 0.8, 0, 10, 20, 20))
    kinds, _, ap, without = evaluate(truth, found, 1)
    assert kinds == ["location", "location"] and ap == 0
    assert without["location"] == pytest.approx(100 * 51 / 101)


def test_missed_objects_are_not_counted():
    truth = truth_of((0, 0, 0, 20, 20), (0, 100, 0, 20, 20), (1, 200, 0, 20, 20))
    _, errors, ap, without = evaluate(truth, found_of((0, 0.9, 0, 0, 20, 20)), 2)
    assert errors.missed.tolist() == [False, True, True]
    assert ap == pytest.approx(100 * 51 / 101 / 2) and without["missed"] == pytest.approx(100)


def test_kinds_by_the_definitions(case):
    """Each detection by itself, with torchvision's IoU; crowds are no objects."""
    _, _, dataset, results = case
    truth, found = GroundTruth.of(dataset), Detections.of(dataset, results, "bbox", "coco")
    matches = find_matches(truth, found, "bbox")
    errors = find_errors(truth, found, "bbox", matches)
    boxes, own = (box_convert(torch.from_numpy(x.boxes), "xywh", "xyxy") for x in (truth, found))
    ious = box_iou(own, boxes)
    covered = set()
    for d in range(len(found.scores)):
        if matches.truth_of[d] >= 0:
            assert errors.kinds[d] == -1
            continue
        here = [t for t in range(len(truth.images)) if truth.images[t] == found.images[d] and not truth.crowds[t]]
        of_class = {t: float(ious[d, t]) for t in here if truth.classes[t] == found.classes[d]}
        others = {t: float(ious[d, t]) for t in here if truth.classes[t] != found.classes[d]}
        best, best_other = max(of_class.values(), default=0), max(others.values(), default=0)
        if 0.1 <= best < 0.5:
            kind, meant = "location", max(of_class, key=of_class.get)
        elif best_other >= 0.5:
            kind, meant = "class", max(others, key=others.get)
        elif best >= 0.5:
            kind, meant = "duplicate", -1
        elif max(best, best_other) <= 0.1:
            kind, meant = "background", -1
        else:
            kind, meant = "both", -1
        covered.add(meant)
        assert (ERROR_KINDS[errors.kinds[d]], errors.meant[d]) == (kind, meant)
    assert set(errors.kinds) == {-1, 0, 1, 2, 3, 4}
    for t in range(len(truth.images)):
        is_missed = not truth.crowds[t] and t not in matches.truth_of and t not in covered
        assert errors.missed[t] == is_missed
