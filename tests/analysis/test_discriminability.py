import csv
import json

import pytest
import torch
from PIL import Image

from codetr_d2.analysis.discriminability import discriminability_score
from codetr_d2.modeling.pyramid import build_pyramid


def test_the_score_is_of_norms_and_leaves_the_padding_out():
    fine = torch.zeros(1, 2, 2, 4)
    fine[0, :, 0, 0] = torch.tensor([3.0, 4.0])  # norm 5
    fine[0, 0, 1, 1] = -10.0
    fine[..., 2:] = 99.0  # padding
    coarse = torch.full((1, 2, 1, 2), 7.0)
    coarse[..., 1] = 99.0
    pyramid = build_pyramid([fine, coarse], [1, 2], [(2, 2)], (2, 4))
    score = discriminability_score(pyramid, (2, 2))
    torch.testing.assert_close(score, torch.tensor([[0.75, 0.5], [0.5, 1.0]]))


@pytest.mark.slow
def test_models_side_by_side(analyze, write_run, write_data, tmp_path, capsys):
    data = write_data(masks=True)
    aux = ("MODEL.CODETR.AUX_HEADS", ["atss"], "MODEL.CODETR.CANVAS_SIZE", 128)
    models = [f"--model=plain={write_run('plain', data)}", f"--model=on a canvas={write_run('aux', data, *aux)}"]
    output = tmp_path / "out"
    analyze(["discriminability", *models, f"--output={output}", "--images=2"])
    rows = json.loads((output / "discriminability.json").read_text())
    assert [(x["model"], x["source"], x["images"]) for x in rows] == [
        ("plain", "backbone", 2),
        ("plain", "encoder", 2),
        ("on a canvas", "backbone", 2),
        ("on a canvas", "encoder", 2),
    ]
    assert all(0 < x["area"] < 1 for x in rows)
    with open(output / "discriminability_curves.csv") as file:
        points = list(csv.DictReader(file))
    assert {x["model"] for x in points} == {"plain", "on a canvas"}
    assert all(0 <= float(x["IoB"]) <= 1 for x in points)
    for name in ("discriminability", "discriminability_maps"):
        assert Image.open(output / f"{name}.png").width > 500
    assert "| on a canvas | encoder" in capsys.readouterr().out


@pytest.mark.slow
def test_errors_are_one_line(analyze, write_run, write_data, tmp_path, capsys):
    model = f"--model=plain={write_run('plain', write_data(boxes=False))}"
    for options, message in (
        ([model], "has no boxes"),
        (["--model=nothing"], "NAME=CONFIG"),
        ([model, "--images=0"], "--images: '0' must be a whole number from 1 on"),
    ):
        with pytest.raises(SystemExit) as exit:
            analyze(["discriminability", *options, f"--output={tmp_path / 'out'}"])
        error = capsys.readouterr().err.strip().splitlines()[-1]
        assert exit.value.code == 2 and "error: " in error and message in error
