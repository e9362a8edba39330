"""Options of the whole test suite, and what every test starts with."""

import matplotlib
import pytest
import torch

from codetr_d2.structures import FeaturePyramid

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


@pytest.fixture
def memory():
    """An encoder's output for two images of 32x48 pixels, strides 8 and 16; the second image is narrower."""
    shapes = [(4, 6), (2, 3)]
    mask = [torch.zeros(2, h, w, dtype=torch.bool) for h, w in shapes]
    mask[0][1, :, 4:] = True
    mask[1][1, :, 2:] = True
    return FeaturePyramid(
        tokens=torch.randn(2, 30, 32),
        padding_mask=torch.cat([m.flatten(1) for m in mask], dim=1),
        shapes=shapes,
        strides=[8, 16],
        image_sizes=[(32, 48), (32, 32)],
        batch_shape=(32, 48),
        padded_sizes=[(32, 48), (32, 32)],
        valid_ratios=torch.tensor([[[1.0, 1.0], [1.0, 1.0]], [[4 / 6, 1.0], [2 / 3, 1.0]]]),
    )
