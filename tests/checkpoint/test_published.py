import json
from pathlib import Path

import pytest
import torch

from codetr_d2.checkpoint.published import codetr_to_published, is_published, published_to_codetr

KEYS = Path(__file__).parents[1] / "reference" / "data" / "keys" / "co_deformable_detr_r50_1x_coco.json"


@pytest.fixture
def published():
    """A state dict of the published names and of distinct tensors."""
    shapes = json.loads(KEYS.read_text())
    del shapes["_meta"]
    return {name: torch.empty(shape) for name, shape in shapes.items()}


def test_round_trip(published):
    ours, unused = published_to_codetr(published)
    assert all(name.endswith("num_batches_tracked") for name in unused)
    back = codetr_to_published(ours)
    assert set(back) == set(published) - set(unused)
    assert all(back[name].shape == published[name].shape for name in back)
    split = [name for name in back if not name.endswith("head_pos_embed.weight")]
    assert all(back[name] is published[name] for name in split)


def test_recognised(published):
    assert is_published(published)
    assert not is_published(published_to_codetr(published)[0])


def test_foreign_names_are_reported():
    ours, unused = published_to_codetr({"query_head.something.weight": torch.zeros(1)})
    assert not ours and list(unused) == ["query_head.something.weight"]
    with pytest.raises(KeyError, match="something"):
        codetr_to_published({"query_head.decoder.class_embed.0.bias": torch.zeros(1), "something": torch.zeros(1)})
