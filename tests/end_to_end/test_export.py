"""Every kind of model exported, and tools/export.py on a model that was trained."""

from pathlib import Path

import pytest

from tests.exported_model import KINDS, check_kind

pytestmark = pytest.mark.slow

ROOT = Path(__file__).parents[2]


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind != "Co-DINO, soft-NMS, BGR"])
def test_detections_are_the_models_at_any_size_and_in_a_batch(kind, tmp_path):
    check_kind(kind, tmp_path)
