"""Customised queries: chosen, counted and measured as worked out by hand."""

import json

import pytest
import torch
from detectron2.structures import Boxes, Instances
from PIL import Image

from codetr_d2.analysis.queries import (
    CustomisedQueries,
    customised_queries,
    distance_to_nearest,
    positives_of_objects,
)
from codetr_d2.modeling.structures import PositiveSamples
from tests.small_model import build, make_batch


def test_positives_and_as_many_negatives():
    boxes = torch.arange(6)[:, None] * 10 + torch.tensor([0.0, 0.0, 5.0, 5.0])
    boxes[5] = 0  # left out of the training
    labels = torch.tensor([3, 1, 3, 3, 0, 3])  # 3: background
    samples = PositiveSamples([boxes], [labels], [boxes + 1], [torch.zeros(6, 8)])
    queries = CustomisedQueries.choose(samples, num_classes=3)
    assert torch.equal(queries.positives, boxes[[1, 4]])
    assert torch.equal(queries.target_boxes, boxes[[1, 4]] + 1)
    assert len(queries.negatives) == 2
    assert {x[0] for x in queries.negatives.tolist()} < {0, 20, 30}


def test_the_distance_is_a_share_of_the_diagonal():
    boxes = torch.tensor([[0.0, 0, 20, 20], [20.0, 30, 40, 50]])  # centres (10, 10) and (30, 40)
    originals = torch.tensor([[13.0, 14.0], [30.0, 30.0], [90.0, 0.0]])
    distances = distance_to_nearest(boxes, originals, (30, 40))  # diagonal 50
    torch.testing.assert_close(distances, torch.tensor([5 / 50, 10 / 50]))
    assert distance_to_nearest(boxes[:0], originals, (30, 40)).shape == (0,)


def test_every_object_has_its_count():
    objects = torch.tensor([[0.0, 0, 10, 10], [5.0, 5, 9, 9], [1.0, 2, 3, 4]])
    targets = objects[[2, 0, 2, 2]] + 1e-4
    assert positives_of_objects(targets, objects).tolist() == [1, 0, 3]
    assert positives_of_objects(targets[:0], objects).tolist() == [0, 0, 0]
    assert positives_of_objects(targets[:0], objects[:0]).tolist() == []


@pytest.mark.slow
def test_every_head():
    heads = ("roi", "atss", "retinanet", "fcos", "paa", "gfl")
    model = build(aux_heads=heads).eval()
    [x] = make_batch(3)
    before = {name: value.clone() for name, value in model.state_dict().items()}
    with torch.no_grad():
        memory = model.encode(model.features(model.preprocess([x])))
    state = torch.random.get_rng_state()
    queries = customised_queries(model, memory, x["instances"])
    assert torch.equal(torch.random.get_rng_state(), state)
    again = customised_queries(model, memory, x["instances"])
    assert list(queries) == list(heads)
    gt_boxes = x["instances"].gt_boxes.tensor
    for name, found in queries.items():
        assert len(found.positives) == len(found.target_boxes) > 0, name
        assert torch.equal(found.negatives, again[name].negatives), name
        assert torch.cdist(found.target_boxes, gt_boxes).amin(1).max() < 1e-3, name
        assert positives_of_objects(found.target_boxes, gt_boxes).sum() == len(found.positives), name
    assert not any(module.training for module in model.modules())
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.slow
def test_an_image_without_objects_has_no_positives():
    model = build(aux_heads=("roi", "atss")).eval()
    [x] = make_batch(0)
    with torch.no_grad():
        memory = model.encode(model.features(model.preprocess([x])))
    empty = Instances(x["instances"].image_size, gt_boxes=Boxes(torch.zeros(0, 4)), gt_classes=torch.zeros(0).long())
    for found in customised_queries(model, memory, empty).values():
        assert found.positives.shape == found.negatives.shape == (0, 4)


@pytest.mark.slow
def test_models_side_by_side(analyze, write_run, write_data, tmp_path, capsys):
    data = write_data()
    one = write_run("one", data, "MODEL.CODETR.AUX_HEADS", ["atss"])
    two = write_run("two", data, "MODEL.CODETR.AUX_HEADS", ["roi", "fcos"])
    output = tmp_path / "out"
    analyze(["queries", f"--model=one={one}", f"--model=two={two}", f"--output={output}", "--images=2"])
    rows = json.loads((output / "queries.json").read_text())
    assert [(x["model"], x["head"], x["objects"], x["images"]) for x in rows] == [
        ("one", "atss", 4, 2),
        ("two", "roi", 4, 2),
        ("two", "fcos", 4, 2),
    ]
    assert all(0 < x["positive distance"] < 1 for x in rows)
    objects = json.loads((output / "queries_objects.json").read_text())
    for row in rows:
        counts = [x["positives"] for x in objects if (x["model"], x["head"]) == (row["model"], row["head"])]
        assert row["positives per object"] == pytest.approx(sum(counts) / 4)
    for name in ("queries", "queries_distance"):
        assert Image.open(output / f"{name}.png").width > 500

    plain = write_run("plain", data)
    with pytest.raises(SystemExit):
        analyze(["queries", f"--model=plain={plain}", f"--output={output}"])
    assert "error: --model plain: MODEL.CODETR.AUX_HEADS is empty" in capsys.readouterr().err


@pytest.mark.slow
def test_no_positive_is_no_distance(analyze, write_run, write_data, tmp_path, monkeypatch):
    none = CustomisedQueries(*torch.zeros(3, 0, 4))
    monkeypatch.setattr("codetr_d2.analysis.queries.customised_queries", lambda *_: {"atss": none})
    run = write_run("run", write_data(), "MODEL.CODETR.AUX_HEADS", ["atss"])
    analyze(["queries", f"--model=ours={run}", f"--output={tmp_path / 'out'}", "--images=1"])
    [row] = json.loads((tmp_path / "out" / "queries.json").read_text())
    assert (row["positives per object"], row["objects without"], row["positive distance"]) == (0, 1, None)
