"""The wheel in an environment of its own, and its commands in a folder that is not the project's."""

import json
import os
import shutil
import subprocess
import sys
import sysconfig
from pathlib import Path

import pytest
import torch

from tests.data.formats import exports

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]
ZOO_NAME = "quick_start/co_deformable_detr_efficientnet_lite0_digits.yaml"
SMALL = {
    "MODEL.WEIGHTS": "",
    "MODEL.CODETR.EMBED_DIM": 32,
    "MODEL.CODETR.ENCODER.NUM_LAYERS": 1,
    "MODEL.CODETR.DECODER.NUM_LAYERS": 1,
    "SOLVER.MAX_EPOCHS": 0,
    "SOLVER.STEPS_EPOCHS": (),
    "SOLVER.MAX_ITER": 2,
    "DATALOADER.NUM_WORKERS": 0,
}


def run(*command, code=0, **options) -> str:
    """What a command prints; it ends with the exit code."""
    result = subprocess.run(
        [str(x) for x in command], stdout=subprocess.PIPE, stderr=subprocess.STDOUT, text=True, **options
    )
    assert result.returncode == code, f"{command}\n{result.stdout}"
    return result.stdout


@pytest.fixture(scope="module")
def environment(tmp_path_factory) -> Path:
    """A virtual environment with the wheel; what the wheel asks for is that of the running environment.

    The C++ library, whose build takes minutes, is that of the checkout, if there is one.
    """
    folder = tmp_path_factory.mktemp("wheel")
    source = folder / "source"
    source.mkdir()
    for name in ("setup.py", "pyproject.toml", "codetr_d2", "codetr_d2_programs", "configs"):
        (source / name).symlink_to(ROOT / name)
    pip = [sys.executable, "-m", "pip", "--disable-pip-version-check"]
    options = ["--no-deps", "--no-index", "--quiet"]
    without_cpp = {**os.environ, "CODETR_D2_NO_CPP": "1"}
    run(*pip, "wheel", *options, "--no-build-isolation", "--wheel-dir", folder, source, cwd=folder, env=without_cpp)

    environment = folder / "environment"
    run(sys.executable, "-m", "venv", "--without-pip", environment)
    [wheel] = folder.glob("*.whl")
    run(*pip, "--python", environment / "bin" / "python", "install", *options, wheel, cwd=folder)
    [packages] = environment.glob("lib/python*/site-packages")
    # By a path alone, the .pth files in there have no effect: no checkout that is installed as editable comes in.
    (packages / "running_environment.pth").write_text(sysconfig.get_path("purelib") + "\n")
    for library in (ROOT / "codetr_d2").glob("_C.*"):
        shutil.copy(library, packages / "codetr_d2")
    return environment


@pytest.fixture
def codetr_d2(environment, tmp_path):
    """A function (argument, ..., code=0) that runs ``codetr_d2`` in an empty folder and returns what it prints."""
    variables = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"}

    def run_command(*arguments, code=0):
        return run(environment / "bin" / "codetr_d2", *arguments, code=code, cwd=tmp_path, env=variables)

    return run_command


def test_from_an_export_to_a_report(codetr_d2, environment, tmp_path):
    exports.yolo_squares(tmp_path / "yolo")
    weights = tmp_path / "datasets" / "weights" / "tf_efficientnet_lite0.pth"
    weights.parent.mkdir(parents=True)
    torch.save({"model": {}}, weights)  # else they are fetched
    codetr_d2("prepare-dataset", "yolo", "--output", "datasets/mine", "--device", "cpu")

    options = [str(x) for pair in SMALL.items() for x in pair]
    codetr_d2("train", "--config-file", "datasets/mine/config.yaml", "--num-processes", 2, *options)
    output = tmp_path / "output" / "mine"
    config, trained = output / "config.yaml", output / "model_final.pth"
    assert "bbox/AP" in json.loads((output / "metrics.json").read_text().splitlines()[-1])
    assert "AP50" in codetr_d2("evaluate", "--config-file", config, "MODEL.WEIGHTS", trained)

    codetr_d2("predict", "yolo/images", "--output", "found", "--config-file", config)
    assert len(json.loads((tmp_path / "found" / "detections.json").read_text())) == 12
    codetr_d2("report", output)
    assert f"codetr_d2 evaluate --config-file {config}" in (output / "report.html").read_text()

    models = ["--model", f"mine={config}", "--model", f"zoo={ZOO_NAME}"]
    codetr_d2("analyze", "cost", *models, "--size", "64x64", "--repeat", 1, "--output", "cost", "--device", "cpu")
    assert {x["model"] for x in json.loads((tmp_path / "cost" / "cost.json").read_text())} == {"mine", "zoo"}


def test_a_config_that_is_nowhere(codetr_d2, environment, tmp_path):
    """The error names the working folder and the model zoo of the environment."""
    last = codetr_d2("train", "--config-file", "co_dino/nothing.yaml", code=2).splitlines()[-1]
    assert last.startswith("error: co_dino/nothing.yaml: ") and f"none in {tmp_path}," in last
    assert f"model zoo ({environment}/lib" in last
