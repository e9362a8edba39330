"""Options of the whole test suite, and what every test starts with."""

import matplotlib
import pytest
import torch

matplotlib.use("Agg")  # tests draw into files, on machines without a screen


def pytest_addoption(parser):
    parser.addoption(
        "--reference-dir",
        metavar="DIR",
        help="recordings of the published implementation to compare with (default: those in tests/reference/data)",
    )


@pytest.fixture(autouse=True)
def seed():
    torch.manual_seed(0)
