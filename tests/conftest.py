"""Options of the whole test suite, and what every test starts with."""

import logging
import resource
from contextlib import contextmanager

import matplotlib
import pytest
import torch
import yaml
from detectron2.utils import comm
from detectron2.utils.logger import setup_logger

from codetr_d2.modeling.pyramid import FeaturePyramid, Geometry
from codetr_d2.ops import bfloat16
from tests.tiny_detector import NUM_CLASSES, write_dataset

matplotlib.use("Agg")  # tests draw into files, on machines without a screen


def pytest_addoption(parser):
    parser.addoption(
        "--reference-dir",
        metavar="DIR",
        help="recordings of the published implementation to compare with (default: those in tests/reference/data)",
    )


@pytest.fixture(scope="session", autouse=True)
def float32_on_every_machine():
    """Models compute as on a machine that is not faster in bfloat16, so that numbers don't depend on the machine."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(bfloat16, "fast_bfloat16", lambda device: (False, "this is a test"))
        yield


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)


@pytest.fixture(autouse=True)
def no_logs_of_other_tests():
    """A run in a test logs to that test's output, which is closed after it; so loggers are as new for each test."""
    for name in ("fvcore", "detectron2", "codetr_d2"):
        logger = logging.getLogger(name)
        logger.handlers.clear()
        logger.propagate = True
    setup_logger.cache_clear()  # it adds no handler where it believes one to be there


@pytest.fixture
def limit_files():
    """A context in which no file gets larger than ``size`` bytes: writes then fail as on a full disk."""

    @contextmanager
    def limit(size):
        before = resource.getrlimit(resource.RLIMIT_FSIZE)
        resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
        try:
            yield
        finally:  # at once: pytest may write into a file too
            resource.setrlimit(resource.RLIMIT_FSIZE, before)

    return limit


@pytest.fixture
def memory():
    """An encoder's output for two images of 32x48 pixels, strides 8 and 16; the second image is narrower."""
    geometry = Geometry.build([(4, 6), (2, 3)], [8, 16], [(32, 48), (32, 32)], (32, 48))
    return FeaturePyramid(torch.randn(2, 30, 32), geometry)


@pytest.fixture
def other_process(monkeypatch):
    """A function after whose call the training seems to have a second process, with ``factor`` times the numbers."""

    def start(factor):
        monkeypatch.setattr(comm, "get_world_size", lambda: 2)
        monkeypatch.setattr(torch.distributed, "all_reduce", lambda x: x.add_(factor * x))

    return start


@pytest.fixture(scope="session")
def coco_json(tmp_path_factory):
    """DATASETS.COCO_JSON of a training set of 14 pictures and a test set of 5."""
    folder = tmp_path_factory.mktemp("tiny")
    return [write_dataset(folder, "tiny_train", 14, 0), write_dataset(folder, "tiny_test", 5, 1)]


@pytest.fixture
def config_file(coco_json, tmp_path):
    options = {
        "MODEL": {
            "META_ARCHITECTURE": "TinyDetector",
            "DEVICE": "cpu",
            "CODETR": {"NUM_CLASSES": NUM_CLASSES, "ENCODER": {"DROPOUT": 0.3}},
        },
        "INPUT": {"MIN_SIZE_TRAIN": [30, 36], "MIN_SIZE_TEST": 30},
        "DATASETS": {"COCO_JSON": coco_json, "TRAIN": ["tiny_train"], "TEST": ["tiny_test"]},
        "DATALOADER": {"NUM_WORKERS": 0},
        "SOLVER": {"IMS_PER_BATCH": 4, "MAX_ITER": 6, "STEPS": [1], "BASE_LR": 0.01, "WARMUP_ITERS": 2},
        "SEED": 7,
        "OUTPUT_DIR": str(tmp_path / "run"),
    }
    path = tmp_path / "config.yaml"
    path.write_text(yaml.safe_dump(options))
    return path
