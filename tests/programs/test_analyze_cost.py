"""``codetr_d2 analyze cost``."""

import csv
import json

import pytest

from codetr_d2_programs import analyze
from tests.tiny_run import CONFIGS, write_tiny_run

CONFIG = CONFIGS / "quick_start" / "co_deformable_detr_efficientnet_lite0_digits.yaml"


def test_cost_needs_neither_weights_nor_data(tmp_path, capsys):
    write_tiny_run(tmp_path / "run", opts=("MODEL.WEIGHTS", "/no/such/file.pth"))
    output = tmp_path / "found"
    models = ["--model", f"small={tmp_path / 'run' / 'config.yaml'}", "--model", f"quick start={CONFIG}"]
    options = ["--size", "64x96", "--repeat", "2", "--depth", "1", "--device", "cpu"]
    analyze.main(["cost", *models, "--output", str(output), *options, "MODEL.CODETR.NUM_QUERIES", "30"])
    printed = capsys.readouterr().out
    assert "query_head.encoder" not in printed and "training adds for atss" in printed
    models = json.loads((output / "cost_models.json").read_text())
    assert [x["model"] for x in models] == ["small", "quick start"]
    assert models[0]["parameters"] == models[0]["parameters_at_inference"] < models[1]["parameters_at_inference"]
    assert (models[0]["height"], models[0]["width"], models[0]["device"]) == (64, 96, "cpu")
    modules = {(x["model"], x["module"]): x for x in json.loads((output / "cost.json").read_text())}
    assert modules["small", ""]["flops"] == models[0]["flops"] > modules["small", "query_head.encoder"]["flops"] > 0
    with open(output / "cost_auxiliary_heads.csv") as file:
        assert [(x["model"], x["head"]) for x in csv.DictReader(file)] == [
            ("quick start", "roi"),
            ("quick start", "atss"),
        ]
    assert (output / "cost.png").exists()


@pytest.mark.parametrize(
    "options, message",
    [
        (["--size", "64"], "no size"),
        (["--repeat", "0"], "from 1 on"),
        (["--model", f"a={CONFIG}"], "one of its own"),
    ],
)
def test_what_is_wrong_is_said(tmp_path, capsys, options, message):
    with pytest.raises(SystemExit) as stop:
        analyze.main(["cost", "--model", f"a={CONFIG}", "--output", str(tmp_path), *options])
    assert stop.value.code == 2 and message in capsys.readouterr().err
