import os
import subprocess
import sys

import pytest
import torch

from codetr_d2.engine import load_config, setup
from codetr_d2.engine.trainer import CoDETRTrainer


@pytest.fixture
def make_config(config_file):
    """A function (KEY, VALUE, ...) -> config, ready for a trainer."""

    def make(*opts):
        cfg = load_config(str(config_file), [str(x) for x in opts])
        os.makedirs(cfg.OUTPUT_DIR, exist_ok=True)
        return setup(cfg)

    return make


@pytest.fixture
def run_training(make_config):
    """A function (KEY, VALUE, ..., resume=False) -> the trainer after its training."""

    def run(*opts, resume=False):
        trainer = CoDETRTrainer(make_config(*opts))
        trainer.resume_or_load(resume)
        trainer.train()
        return trainer

    return run


@pytest.fixture
def start_process(config_file):
    """A function (argument, ...) -> the running process of train_net.py, one thread for each of its processes."""
    processes = []

    def start(*args, **options):
        script = os.path.join(os.path.dirname(__file__), "train_tiny.py")
        command = [sys.executable, script, "--config-file", str(config_file), *map(str, args)]
        environment = {**os.environ, "OMP_NUM_THREADS": "2"}
        processes.append(subprocess.Popen(command, env=environment, start_new_session=True, **options))
        return processes[-1]

    yield start
    for process in processes:
        if process.poll() is None:
            process.kill()
        process.wait()


@pytest.fixture
def assert_same_weights():
    """A function (path, path, tolerance=0): two checkpoints hold the same weights."""

    def check(first, second, tolerance=0.0):
        first, second = (torch.load(path, weights_only=True)["model"] for path in (first, second))
        assert first.keys() == second.keys()
        for name in first:
            torch.testing.assert_close(first[name], second[name], rtol=tolerance, atol=tolerance)

    return check
