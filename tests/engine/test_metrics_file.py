"""Reading a training's metrics.json."""

import json
import math

from codetr_d2.engine.metrics_file import is_finished, read_metrics

LINES = (
    {"iteration": 0, "total_loss": 9.0},
    {"iteration": 20, "bbox/AP": 20.0, "bbox/APl": math.nan},
    {"iteration": 10, "total_loss": 5.0},
    {"iteration": 20, "total_loss": 3.0},
    {"iteration": 40, "total_loss": 2.0},
    {"iteration": 41, "bbox/AP": 30.0},
)


def write(folder, lines, cut=0):
    text = "".join(json.dumps(x) + "\n" for x in lines).replace("NaN", "null")
    (folder / "metrics.json").write_text(text[: len(text) - cut])


def test_lines_of_an_iteration_belong_together(tmp_path):
    write(tmp_path, LINES)
    found = read_metrics(tmp_path)
    assert [x["iteration"] for x in found] == [0, 10, 20, 40, 41]
    assert math.isnan(found[2].pop("bbox/APl"))  # written as null, as JSON has no NaN
    assert found[2] == {"iteration": 20, "bbox/AP": 20.0, "total_loss": 3.0}


def test_a_run_that_was_killed_while_it_wrote_has_not_ended(tmp_path):
    (tmp_path / "model_final.pth").touch()
    write(tmp_path, LINES)
    assert is_finished(tmp_path)
    write(tmp_path, LINES, cut=10)
    assert [x["iteration"] for x in read_metrics(tmp_path)] == [0, 10, 20, 40]
    assert not is_finished(tmp_path)


def test_an_unused_folder_is_no_run(tmp_path):
    assert read_metrics(tmp_path) == [] and not is_finished(tmp_path)
