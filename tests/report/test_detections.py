"""Matches against pycocotools."""

import contextlib
import copy
import io

import numpy as np
import pytest
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from codetr_d2.data.annotations import AnnotatedImages
from codetr_d2.report.curves import interpolated_precision
from codetr_d2.report.detections import Detections, GroundTruth, find_matches


def pycocotools_evaluation(data, detections, task):
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO()
        truth.dataset = copy.deepcopy(data)
        truth.createIndex()
        other = "bbox" if task == "segm" else "segmentation"
        found = [{k: v for k, v in x.items() if k != other} for x in copy.deepcopy(detections)]
        evaluation = COCOeval(truth, truth.loadRes(found), task)
        evaluation.evaluate()
        evaluation.accumulate()
    return evaluation


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_matches_and_precision_are_those_of_pycocotools(case, task):
    data, detections, dataset, results = case
    evaluation = pycocotools_evaluation(data, detections, task)
    expected = {}  # (image, score), which no two detections share -> (id of the object or 0, ignored)
    for image in filter(None, evaluation.evalImgs):
        if image["aRng"] == evaluation.params.areaRng[0]:
            for score, match, ignored in zip(image["dtScores"], image["dtMatches"][0], image["dtIgnore"][0]):
                expected[image["image_id"], score] = (int(match), bool(ignored))
    truth, found = GroundTruth.of(dataset), Detections.of(dataset, results, task, "coco")
    matches = find_matches(truth, found, task)
    ids = [x["id"] for record in dataset.records for x in sorted_annotations(data, record)] + [0]
    actual = {
        (dataset.records[image]["image_id"], score): (ids[match], bool(ignored))
        for image, score, match, ignored in zip(found.images, found.scores, matches.truth_of, matches.ignored)
    }
    assert actual == expected and sum(matches.is_true) > 15 and matches.ignored.any()
    assert all(matches.truth_of[d] == t for t, d in enumerate(matches.found_by) if d >= 0)
    for k in range(3):
        own = (found.classes == k) & ~matches.ignored
        num_objects = int(((truth.classes == k) & ~truth.crowds).sum())
        precision = interpolated_precision(found.scores[own], matches.is_true[own], num_objects)
        np.testing.assert_allclose(precision, evaluation.eval["precision"][0, :, k, 0, 2], atol=1e-12)


def sorted_annotations(data, record):
    return [x for x in data["annotations"] if x["image_id"] == record["image_id"]]


def test_object_before_crowd_and_the_last_of_two_equal_ones():
    """As pycocotools does; neither occurs by chance. Columns are (x, width), all 20 pixels high."""
    objects = [(0, 20), (8, 20), (60, 20), (50, 40)]  # the first two mirror each other around the first detection
    annotations = [
        {"bbox": [x, 0, w, 20], "bbox_mode": 1, "category_id": 0, "iscrowd": int(i == 3)}
        for i, (x, w) in enumerate(objects)
    ]
    dataset = AnnotatedImages("columns", [{"image_id": 1, "file_name": "a.png", "annotations": annotations}])
    columns = [(4, 20, 0.9), (0, 20, 0.8), (63, 20, 0.7), (52, 7, 0.6)]
    results = [{"image_id": 1, "category_id": 0, "bbox": [x, 0, w, 20], "score": s} for x, w, s in columns]
    matches = find_matches(GroundTruth.of(dataset), Detections.of(dataset, results, "bbox", "coco"), "bbox")
    assert matches.truth_of.tolist() == [1, 0, 2, 3] and matches.ignored.tolist() == [False, False, False, True]
    coco = {"info": {}, "images": [{"id": 1, "height": 20, "width": 100}], "categories": [{"id": 0, "name": "x"}]}
    coco["annotations"] = [
        {**x, "id": i + 1, "image_id": 1, "area": x["bbox"][2] * 20} for i, x in enumerate(annotations)
    ]
    (image, *_) = pycocotools_evaluation(coco, results, "bbox").evalImgs
    assert image["dtMatches"][0].tolist() == [2, 1, 3, 4]


def lvis_like():
    """One picture, annotated with class 0, known to lack class 1, class 2 not exhaustively; nothing known of 3."""
    box = {"bbox_mode": 1, "iscrowd": 0}
    annotations = [{**box, "bbox": [x, 0, 20, 20], "category_id": k} for x, k in ((0, 0), (40, 2))]
    record = {"image_id": 5, "file_name": "a.png", "annotations": annotations}
    record |= {"neg_category_ids": [20], "not_exhaustive_category_ids": [30]}
    return AnnotatedImages("lvis", [record], [{"id": i, "name": str(i)} for i in (10, 20, 30, 40)])


def test_lvis_ignores_what_is_not_annotated():
    far = [70.0, 70.0, 20.0, 20.0]
    results = [{"image_id": 5, "category_id": k, "bbox": far, "score": 0.9 - k / 10} for k in range(4)]
    results.append({"image_id": 5, "category_id": 2, "bbox": [40.0, 0.0, 20.0, 20.0], "score": 0.1})
    dataset = lvis_like()
    truth, found = GroundTruth.of(dataset), Detections.of(dataset, results, "bbox", "lvis")
    assert found.classes.tolist() == [0, 1, 2, 2]  # none of class 3
    matches = find_matches(truth, found, "bbox")
    assert matches.ignored.tolist() == [False, False, True, False]
    assert matches.is_true.tolist() == [False, False, False, True]


def test_no_more_detections_count_than_in_the_average_precision():
    dataset = lvis_like()
    results = [
        {"image_id": 5, "category_id": k, "bbox": [0.0, 0.0, 9.0, 9.0], "score": (i + 0.1 * k) / 200}
        for k in (0, 1)
        for i in range(180)
    ]
    of_coco, of_lvis = (Detections.of(dataset, results, "bbox", style) for style in ("coco", "lvis"))
    assert np.bincount(of_coco.classes).tolist() == [100, 100] and of_coco.scores.min() == 80 / 200
    assert len(of_lvis.scores) == 300 and of_lvis.scores.min() == pytest.approx(30 / 200)


def test_nothing_found():
    dataset = lvis_like()
    truth, found = GroundTruth.of(dataset), Detections.of(dataset, [], "bbox", "coco")
    matches = find_matches(truth, found, "bbox")
    assert len(matches.truth_of) == 0 and matches.found_by.tolist() == [-1, -1]
