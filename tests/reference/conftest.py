"""Every test here runs for each case that the folder of recordings holds (``--reference-dir``, default ``data/``)."""

import json
from pathlib import Path

import numpy as np
import pytest
import torch

from tests.reference.recordings import (
    DEFAULT_DIR,
    build_recorded_model,
    find_cases,
    recorded_inputs,
)
from tests.reference.run_masks import run_masks
from tests.reference.run_model import run_inference, run_training


def reference_dir(config) -> Path:
    return Path(config.getoption("--reference-dir", default=None) or DEFAULT_DIR).resolve()


def pytest_generate_tests(metafunc):
    folder = reference_dir(metafunc.config)
    for fixture, kind in (("forward", "forward"), ("training", "losses"), ("denoising", "dn")):
        if fixture in metafunc.fixturenames:
            cases = find_cases(folder, kind)
            if metafunc.function.__name__ == "test_masks":  # of the models that have some
                cases = [case for case in cases if "masks" in np.load(folder / kind / f"{case}.npz").files]
            metafunc.parametrize(fixture, cases, indirect=True, scope="session")


@pytest.fixture(scope="session")
def forward(request):
    """(recording, its meta block, our values by the same names) of an inference case."""
    folder = reference_dir(request.config)
    with np.load(folder / "forward" / f"{request.param}.npz") as recording:
        arrays = {name: torch.from_numpy(recording[name]) for name in recording.files if name != "meta_json"}
        meta = json.loads(str(recording["meta_json"]))
    model, batch = build_recorded_model(folder, meta), recorded_inputs(meta)
    ours = run_inference(model, batch, arrays)
    if "masks" in arrays:
        ours |= run_masks(model, batch, arrays, meta)
    return arrays, meta, ours


@pytest.fixture(scope="session")
def training(request):
    """(recording, our values) of a training step."""
    folder = reference_dir(request.config)
    recording = json.loads((folder / "losses" / f"{request.param}.json").read_text())
    meta = recording["meta"]
    with pytest.MonkeyPatch.context() as patch:
        # The recordings permute nothing, so that no random number takes part.
        patch.setattr(torch, "randperm", lambda n, **kwargs: torch.arange(n, device=kwargs.get("device")))
        return recording, run_training(build_recorded_model(folder, meta), recorded_inputs(meta))


@pytest.fixture(scope="session")
def denoising(request):
    """(recording, its meta block) of denoising queries, with the published model that made them."""
    folder = reference_dir(request.config)
    with np.load(folder / "dn" / f"{request.param}.npz") as recording:
        arrays = {name: torch.from_numpy(recording[name]) for name in recording.files if name != "meta_json"}
        meta = json.loads(str(recording["meta_json"]))
    return arrays, meta, folder
