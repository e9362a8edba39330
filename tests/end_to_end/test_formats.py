"""The smallest export of every tool and layout, by the commands of docs/your_data.md, to a trained model and its page.

The programs run in this process, as starting each anew would take most of the time; the model is made small.
"""

import json
import math
from functools import partial
from pathlib import Path

import pytest
import torch

import train_net
from codetr_d2_programs import prepare_dataset, prepare_efficientnet, report
from tests.data.formats import exports

pytestmark = pytest.mark.slow

NUM_ITERATIONS = 2
SMALL = {
    "MODEL.WEIGHTS": "",
    "MODEL.CODETR.EMBED_DIM": 32,
    "MODEL.CODETR.NUM_QUERIES": 20,
    "MODEL.CODETR.ENCODER.NUM_LAYERS": 1,
    "MODEL.CODETR.DECODER.NUM_LAYERS": 1,
    "DATALOADER.NUM_WORKERS": 0,
    "SOLVER.MAX_EPOCHS": 0,
    "SOLVER.STEPS_EPOCHS": (),
    "SOLVER.MAX_ITER": NUM_ITERATIONS,
}


@pytest.mark.parametrize("name", exports.WRITERS)
def test_an_export_becomes_a_model_and_a_page(name, tmp_path, monkeypatch, capsys):
    weights = tmp_path / "weights.pth"
    torch.save({"model": {}}, weights)
    monkeypatch.setattr(prepare_efficientnet, "DEFAULT_FILE", weights)  # there already: nothing is downloaded
    monkeypatch.setattr(report, "write_run_page", partial(report.write_run_page, with_cost=False))  # takes longest
    monkeypatch.chdir(tmp_path)
    exports.WRITERS[name](tmp_path / "export")

    prepare_dataset.main(["export", "--output", f"datasets/{name}", "--device", "cpu"])
    [command] = [x for x in capsys.readouterr().out.splitlines() if x.startswith("Next:")]
    config = command.split("--config-file ")[1].split()[0]
    assert Path(config) == tmp_path / "datasets" / name / "config.yaml"
    assert (tmp_path / "datasets" / name / "dataset.html").is_file()

    train_net.main(["--config-file", config, *(str(x) for pair in SMALL.items() for x in pair)])
    output = tmp_path / "output" / name
    metrics = [json.loads(x) for x in (output / "metrics.json").read_text().splitlines()]
    [losses] = [x["total_loss"] for x in metrics if "total_loss" in x][-1:]
    assert math.isfinite(losses) and losses > 0
    # AP of both classes that were labelled, where the validation set has them.
    [found] = [x for x in metrics if "bbox/AP" in x]
    assert {x for x in found if x.startswith("bbox/AP-")} == {"bbox/AP-cat", "bbox/AP-dog"}
    val = {x["id"] for x in json.loads((tmp_path / "datasets" / name / "val.json").read_text())["images"]}
    detections = json.loads((output / "inference" / "coco_instances_results.json").read_text())
    assert {x["image_id"] for x in detections} == val and {x["category_id"] for x in detections} <= {1, 2}
    assert (output / "model_final.pth").is_file()

    report.main([f"output/{name}"])
    page = (output / "report.html").read_text()
    assert f"<title>{name}: report</title>" in page and '"cat"' in page and '"dog"' in page
