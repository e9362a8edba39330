"""What the page holds, against numbers that are computed otherwise. How it looks and works: test_in_browser.py."""

import doctest
import json
import re
import shlex
import shutil
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from pycocotools import mask as mask_util

from codetr_d2.errors import InputError
from codetr_d2.evaluation import average_precisions
from codetr_d2.report import pictures, run_page
from codetr_d2.report.confusion import confusion_matrix
from codetr_d2.report.detections import Detections, GroundTruth, find_matches
from codetr_d2.report.errors import ERROR_KINDS, find_errors
from codetr_d2.report.pictures import difference, number_of_errors, outline
from codetr_d2.report.run import read_run
from codetr_d2.report.run_data import Evaluated, config_differences
from codetr_d2.report.run_page import page_data, write_run_page
from codetr_d2.report.training import training_charts
from codetr_d2_programs import predict, train
from codetr_d2_programs.__main__ import COMMANDS
from tests.report.tiny_report import CLASS_NAMES, copy_with_other_scores


@pytest.mark.parametrize("task", ["bbox", "segm"])
def test_average_precisions(run, data, task):
    expected = average_precisions(run.dataset, run.results, task, "coco")
    numbers = data["runs"][0]["tasks"][task]
    assert numbers["overall"] == pytest.approx(
        {key: None if np.isnan(expected[key]) else expected[key] for key in numbers["overall"]}, abs=0.005
    )
    for row in numbers["classes"]:
        if np.isnan(expected[f"AP-{row['name']}"]):
            assert row["AP"] is None and row["objects"] == 0 and "score" not in row
        else:
            assert row["AP"] == pytest.approx(expected[f"AP-{row['name']}"], abs=0.005)
    assert numbers["errors"][0]["ap50"] == pytest.approx(expected["AP50"], abs=0.005)


@pytest.mark.parametrize("task", ["bbox", "segm"])
@pytest.mark.parametrize("least", [20, 71])
def test_counts_above_a_score_are_those_of_the_detections_above_it(run, data, task, least):
    """What the page adds up in the browser."""
    above = [x for x in run.results if x["score"] >= least / 100]
    truth, found = GroundTruth.of(run.dataset), Detections.of(run.dataset, above, task, "coco")
    errors = find_errors(truth, found, task, find_matches(truth, found, task))
    numbers = data["runs"][0]["tasks"][task]
    counts = np.zeros((len(ERROR_KINDS), 4), int)
    for kind, k, last, number in numbers["counts"]:
        counts[kind, k] += number * (last < least if ERROR_KINDS[kind] == "missed" else last >= least)
    for kind, name in enumerate(ERROR_KINDS[:-1]):
        assert counts[kind].tolist() == np.bincount(found.classes[errors.kinds == kind], minlength=4).tolist(), name
    assert counts[-1].tolist() == np.bincount(truth.classes[errors.missed], minlength=4).tolist()
    confusion = np.zeros((5, 5), int)
    for row, column, last, number in numbers["confusion"]:
        confusion[row, column] += number * (last >= least)
    assert (confusion[:, :4] == confusion_matrix(truth, found, task, 0, 4)[:, :4]).all() and confusion.any()


def test_best_score_has_the_best_mean_of_f1(data):
    for numbers in data["runs"][0]["tasks"].values():
        f1 = np.array(numbers["curves"]["f1"][:3])  # the fourth class has no object
        assert numbers["curves"]["f1"][3] is None
        assert f1.mean(0).argmax() == numbers["best_bin"] > 0
        assert numbers["best_f1"] == pytest.approx(100 * f1.mean(0).max(), abs=0.1)


def test_pictures_come_with_what_is_found_in_them(run, data):
    assert len(data["pictures"]) == data["num_images"] == 8
    least = data["runs"][0]["tasks"]["bbox"]["best_bin"]
    badness = number_of_errors(Evaluated(run, "bbox"), least, 8)
    files = [str(x["file_name"]) for x in run.dataset.records]
    shown = [badness[files.index(x["file"])] for x in data["pictures"]]
    assert shown == sorted(badness, reverse=True) and shown[0] > shown[-1]
    for picture in data["pictures"]:
        errors = 0
        for detection in picture["runs"][0]:
            kind, points = detection["bbox"]
            errors += points // 100 >= least and kind not in ("correct", "ignored")
            assert detection["mask"].startswith("M") and "segm" in detection
        errors += sum(x["runs"][0]["bbox"][0] < least for x in picture["objects"] if not x["crowd"])
        assert errors == badness[files.index(picture["file"])]
        assert picture["source"].startswith("data:image/jpeg;base64,")


def test_page_holds_its_data_and_fetches_nothing(run, tmp_path, data):
    write_run_page([run], tmp_path / "new" / "report.html", with_cost=False)
    text = (tmp_path / "new" / "report.html").read_text()
    assert "{{" not in text.split('id="data"')[0] and text.count("</script>") == 2
    held = re.search(r'id="data">(.*?)</script>', text, re.DOTALL).group(1)
    assert json.loads(held) == json.loads(json.dumps(data)) and CLASS_NAMES[2] in data["classes"]
    assert not re.search(r"https?://(?!www\.w3\.org)|src=\"[^d]|@import|url\(", text.replace(held, ""))


def test_pictures_that_do_not_fit_are_left_out(run, data, monkeypatch):
    size = len(json.dumps(data["pictures"][0]))
    without = len(json.dumps({**data, "pictures": []}))
    monkeypatch.setattr(run_page, "MAX_BYTES", 200_000 + without + int(2.5 * size))
    few = page_data([run], with_cost=False)["pictures"]
    assert 1 <= len(few) <= 3 and few == data["pictures"][: len(few)]


def test_two_runs(tmp_path, run):
    other = read_run(copy_with_other_scores(run.folder, tmp_path / "other", seed=1))
    data = page_data([run, other], with_cost=False)
    assert [x["name"] for x in data["runs"]] == ["run", "other"]
    least = [x["tasks"]["bbox"]["best_bin"] for x in data["runs"]]
    by_hand = []
    for picture in data["pictures"]:
        found, errors = [], []
        for r in (0, 1):
            found.append([x["runs"][r]["bbox"][0] >= least[r] for x in picture["objects"] if not x["crowd"]])
            shown = [x["bbox"][0] for x in picture["runs"][r] if x["bbox"][1] // 100 >= least[r]]
            errors.append(found[r].count(False) + sum(kind not in ("correct", "ignored") for kind in shown))
        by_hand.append(sum(a != b for a, b in zip(*found)) + abs(errors[0] - errors[1]))
    badness = difference(*[(Evaluated(x, "bbox"), t) for x, t in zip((run, other), least)], 8)
    assert by_hand == sorted(badness, reverse=True) and max(by_hand) > 0


def test_runs_on_different_datasets(tmp_path, run):
    """The same pictures, with an object less."""
    folder = shutil.copytree(run.folder.parent, tmp_path / "other")
    (folder / "run" / "config.yaml").write_text(
        (run.folder / "config.yaml").read_text().replace(str(run.folder.parent), str(folder))
    )
    data = json.loads((folder / "data" / "truth.json").read_text())
    (folder / "data" / "truth.json").write_text(json.dumps({**data, "annotations": data["annotations"][1:]}))
    with pytest.raises(InputError, match="evaluate both on the same dataset"):
        page_data([run, read_run(folder / "run")], with_cost=False)


def test_outlines_follow_masks_and_their_holes():
    mask = np.zeros((60, 90), np.uint8)
    cv2.ellipse(mask, (40, 30), (30, 20), 20, 0, 360, 1, -1)
    mask[25:35, 35:45] = 0
    mask[2:8, 80:88] = 1
    path = outline(mask_util.encode(np.asfortranarray(mask)))
    drawn = np.zeros((600, 900), np.uint8)  # ten times as large
    rings = [np.array([p.split() for p in ring.rstrip("Z").split("L")], float) for ring in path.split("M")[1:]]
    assert len(rings) == 3
    cv2.fillPoly(drawn, [(10 * ring).round().astype(int) for ring in rings], 1)  # even-odd
    expected = np.kron(mask, np.ones((10, 10), np.uint8))
    assert (drawn & expected).sum() / (drawn | expected).sum() > 0.95
    assert outline(mask_util.encode(np.zeros((5, 5), np.uint8, order="F"))) == ""


def test_examples():
    assert doctest.testmod(pictures).failed == 0 and doctest.testmod(pictures).attempted


def test_training_charts():
    metrics = [
        {"iteration": 0, "total_loss": 5.0, "loss_cls": 1.0, "loss_cls_0": 2.0, "loss_cls_dn_1": 1.5, "lr": 0.1},
        {"iteration": 20, "loss_rpn_cls_roi": 3.0, "loss_box_aux_roi_0": 1.0, "loss_box_enc": float("nan")},
        {"iteration": 40, "bbox/AP": 50.0, "segm/AP": 40.0, "bbox/AP-cat": 9.0, "rpn/num_pos": 4.0, "loss_x_roi2": 1.0},
    ]
    charts = {
        x["title"]: {(s["name"], s["layer"]): (s["x"], s["y"]) for s in x["series"]}
        for x in training_charts(metrics, ["roi", "roi2"])
    }
    assert charts == {
        "Average precision (%)": {("AP of boxes", None): ([40], [50.0]), ("AP of masks", None): ([40], [40.0])},
        "Total loss": {("total", None): ([0], [5.0])},
        "Losses of the detector": {("cls", None): ([0], [1.0]), ("cls", 0): ([0], [2.0])},
        "Losses of denoising queries": {("cls", 1): ([0], [1.5])},
        "Losses of auxiliary head roi": {("rpn_cls", None): ([20], [3.0])},
        "Losses of auxiliary head roi2": {("x", None): ([40], [1.0])},
        "Losses of positive queries of roi": {("box", 0): ([20], [1.0])},
        "Learning rate": {("learning rate", None): ([0], [0.1])},
        "Logged by rpn": {("num_pos", None): ([40], [4.0])},
    }


def test_options_that_differ_from_the_defaults(run):
    found = {x["key"]: (x["default"], x["value"]) for x in config_differences(run)}
    assert found["MODEL.CODETR.NUM_QUERIES"] == ("300", "20") and found["MODEL.CODETR.AUX_HEADS"][1] == "[]"
    assert "SOLVER.WEIGHT_DECAY_NORM" not in found and "OUTPUT_DIR" not in found


def test_commands_are_those_of_the_programs(data):
    lines = {what: shlex.split(line) for what, line in data["runs"][0]["commands"]}
    folder = Path(dict(data["runs"][0]["about"])["folder"])
    assert [lines[x][:2] for x in ("evaluate again", "predict")] == [
        ["codetr_d2", "evaluate"],
        ["codetr_d2", "predict"],
    ]
    evaluate = train.build_parser().parse_args([*COMMANDS["evaluate"][1], *lines["evaluate again"][2:]])
    assert evaluate.eval_only and evaluate.opts == ["MODEL.WEIGHTS", str(folder / "model_final.pth")]
    predict_arguments = predict.parse_arguments(lines["predict"][2:])
    assert (evaluate.config_file, predict_arguments.config_file) == (
        str(folder / "config.yaml"),
        folder / "config.yaml",
    )
    assert predict_arguments.weights == str(folder / "model_final.pth")


@pytest.mark.slow
def test_detections_are_made_where_there_are_none(run, tmp_path):
    """By the weights, as an evaluation makes them; the folder keeps them."""
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder, ignore=shutil.ignore_patterns("inference", "last_checkpoint"))
    made = read_run(folder)
    file = folder / "inference" / "coco_instances_results.json"
    kept = file.read_text()
    assert {x["image_id"] for x in made.results} == {x["image_id"] for x in run.dataset.records}
    assert {x["category_id"] for x in made.results} <= {0, 1, 2, 3}
    assert {x["category_id"] for x in json.loads(kept)} <= {0, 10, 20, 30}
    assert read_run(folder).results == made.results and file.read_text() == kept
    data = page_data([made], with_cost=True)
    model = torch.load(folder / "model_final.pth", weights_only=True)["model"]
    parameters = sum(x.numel() for name, x in model.items() if "running" not in name and "num_batches" not in name)
    cost = data["runs"][0]["cost"]
    assert cost["size"] == [128, 128] and cost["flops"] > 1e6 and cost["seconds"] > 0
    assert 0.98 * parameters < cost["parameters"] <= parameters

    shutil.rmtree(folder / "inference")
    (folder / "model_final.pth").unlink()
    with pytest.raises(InputError, match="neither detections .* nor weights"):
        read_run(folder)


@pytest.mark.parametrize(
    "content, message",
    [
        ("[{}]", "no detections in COCO's format"),
        ("{", "no detections in COCO's format"),
        ('[{"image_id": 4, "category_id": 10, "bbox": [0, 0, 1, 1], "score": 1}]', "image 4 or category 10 is not in"),
        ('[{"image_id": 3, "category_id": 2, "bbox": [0, 0, 1, 1], "score": 1}]', "image 3 or category 2 is not in"),
    ],
)
def test_detections_of_something_else(run, tmp_path, content, message):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    (folder / "inference" / "coco_instances_results.json").write_text(content)
    with pytest.raises(InputError, match=message):
        read_run(folder)


def test_nothing_to_find(run, tmp_path):
    """Crowds alone."""
    folder = shutil.copytree(run.folder.parent, tmp_path / "other")
    config = (run.folder / "config.yaml").read_text().replace(str(run.folder.parent), str(folder))
    (folder / "run" / "config.yaml").write_text(config)
    data = json.loads((folder / "data" / "truth.json").read_text())
    crowds = [x for x in data["annotations"] if x["iscrowd"]]
    (folder / "data" / "truth.json").write_text(json.dumps({**data, "annotations": crowds}))
    with pytest.raises(InputError, match="has no boxes to compare"):
        read_run(folder / "run")


def test_no_run_in_the_folder(tmp_path):
    with pytest.raises(InputError, match="no config.yaml; name the OUTPUT_DIR"):
        read_run(tmp_path)


def test_nothing_is_found_at_all(run, tmp_path):
    folder = tmp_path / "run"
    shutil.copytree(run.folder, folder)
    (folder / "inference" / "coco_instances_results.json").write_text("[]")
    numbers = page_data([read_run(folder)], with_cost=False)["runs"][0]["tasks"]
    assert list(numbers) == ["bbox"] and numbers["bbox"]["overall"]["AP"] == 0
    assert sum(x[3] for x in numbers["bbox"]["counts"]) == sum(x["objects"] for x in numbers["bbox"]["classes"])
