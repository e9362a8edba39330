"""The instability of the matching, against cases worked by hand."""

import json

import pytest
import torch
from detectron2.structures import Boxes, Instances

from codetr_d2.analysis.matches import Matches, match_objects
from codetr_d2.analysis.stability import instability, num_changed
from codetr_d2.errors import InputError
from codetr_d2_programs import analyze
from tests.small_model import build, make_batch

# Of two images with two and three objects. From the first evaluation to the second, queries 5 and 7 swap their objects
# (2 changes), and query 1 hands its object to query 4 (2); from there to the third, an object loses query 9 (1).
EVALUATIONS = [
    (9, [[5, 7], [1, 2, 9]]),
    (19, [[7, 5], [4, 2, 9]]),
    (29, [[7, 5], [4, 2, -1]]),
]


@pytest.mark.parametrize(
    "before, after, changed",
    [
        ([], [], 0),
        ([3, 8], [3, 8], 0),
        ([3, 8], [8, 3], 2),  # both have another object
        ([3], [4], 2),  # one has none any more, one has one
        ([3, -1], [3, 6], 1),
        ([-1, -1], [-1, -1], 0),
        ([0, 1, 2], [0, 2, 3], 3),
    ],
)
def test_changed_queries(before, after, changed):
    assert num_changed(before, after) == changed == brute_force(before, after, 10)


def brute_force(before, after, num_queries):
    """The definition: V_n of every query n."""

    def objects(queries):
        return [queries.index(n) if n in queries else -1 for n in range(num_queries)]

    return sum(a != b for a, b in zip(objects(before), objects(after)))


def test_instability_is_the_mean_over_the_images():
    assert instability(Matches([3, 4], EVALUATIONS)) == [(19, 2.0), (29, 0.5)]


def test_the_file_comes_back_and_a_resumed_run_drops_what_is_later(tmp_path):
    path = str(tmp_path / "matches.json")
    Matches([3, "a"], EVALUATIONS).write(path)
    assert Matches.read(path) == Matches.resume(path, [3, "a"], 30) == Matches([3, "a"], EVALUATIONS)
    assert Matches.resume(path, [3, "a"], 20).evaluations == EVALUATIONS[:2]
    assert Matches.resume(path, [7], 0) == Matches([7])  # a new run
    assert Matches.resume(str(tmp_path / "other.json"), [7], 20) == Matches([7])
    with pytest.raises(InputError, match="2 images, which are not the 1 of now; set TEST.STABILITY_IMAGES"):
        Matches.resume(path, [7], 20)


def test_objects_are_matched_with_the_queries_that_predict_them():
    """Each object is the prediction of one query: of a class that this one is surest of, at its very box."""
    model = build().eval()
    x = make_batch(1)[0]
    with torch.no_grad():
        memory = model.encode(model.features(model.preprocess([x])))
        output = model.predict(memory)
    height, width = x["image"].shape[-2:]
    queries = [11, 2, 17]
    cx, cy, w, h = output.boxes[-1, 0, queries].unbind(-1)
    boxes = torch.stack((cx - w / 2, cy - h / 2, cx + w / 2, cy + h / 2), -1) * torch.tensor([width, height] * 2)
    classes = output.logits[-1, 0, queries].argmax(-1)
    model.query_head.criterion.matcher.cost_box = 1000.0
    x["instances"] = Instances((height, width), gt_boxes=Boxes(boxes), gt_classes=classes)
    assert match_objects(model, x) == queries
    x["instances"] = x["instances"][:0]
    assert match_objects(model, x) == []


def test_the_program_draws_several_runs(tmp_path, capsys):
    for name, evaluations in (("calm", [EVALUATIONS[0], (19, EVALUATIONS[0][1])]), ("restless", EVALUATIONS)):
        (tmp_path / name).mkdir()
        Matches([3, 4], evaluations).write(str(tmp_path / name / "matches.json"))
    models = [x for name in ("calm", "restless") for x in ("--model", f"{name}={tmp_path / name}")]
    analyze.main(["stability", *models, "--output", str(tmp_path / "found")])
    assert json.loads((tmp_path / "found" / "stability.json").read_text()) == [
        {"model": "calm", "iteration": 19, "IS": 0.0, "images": 2},
        {"model": "restless", "iteration": 19, "IS": 2.0, "images": 2},
        {"model": "restless", "iteration": 29, "IS": 0.5, "images": 2},
    ]
    assert (tmp_path / "found" / "stability.png").exists()


@pytest.mark.parametrize(
    "content, message",
    [
        (None, "A training writes it with the options TEST.STABILITY_IMAGES"),
        ("{}", "holds no matches"),
        ("no JSON", "holds no matches"),
        (json.dumps({"image_ids": [1], "evaluations": []}), "fewer than two evaluations"),
    ],
)
def test_a_folder_without_matches(tmp_path, capsys, content, message):
    if content is not None:
        (tmp_path / "matches.json").write_text(content)
    with pytest.raises(SystemExit) as stop:
        analyze.main(["stability", "--model", f"a={tmp_path}", "--output", str(tmp_path)])
    assert stop.value.code == 2 and message in capsys.readouterr().err
