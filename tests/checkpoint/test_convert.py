import json
from collections import OrderedDict
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg

from codetr_d2 import add_codetr_config
from codetr_d2.checkpoint.convert import checkpoint_to_codetr, checkpoint_to_published
from codetr_d2.errors import InputError

KEYS = Path(__file__).parents[1] / "reference" / "data" / "keys"
NAMES = sorted(path.stem for path in KEYS.glob("co_*.json"))


def published(name):
    """A whole published file of its real names; each tensor has one number, repeated over the first of its axes."""
    shapes = json.loads((KEYS / f"{name}.json").read_text())
    del shapes["_meta"]
    weights = OrderedDict()
    for i, (key, shape) in enumerate(shapes.items()):
        kind = torch.int64 if key.endswith(("num_batches_tracked", "position_index")) else torch.float32
        kind = torch.float16 if "norm1" in key else kind
        weights[key] = torch.tensor(i, dtype=kind).expand(shape[:1] if "head_pos_embed" not in key else shape)
    weights["ema_backbone_conv1_weight"] = torch.ones(2)
    weights._metadata = OrderedDict({"": {"version": 1}, "backbone": {"version": 2}})
    meta = {"epoch": 12, "CLASSES": ("a", "b"), "config": "model = dict()", "seed": None}
    optimizer = {"state": {0: {"step": 3, "exp_avg": torch.ones(2)}}, "param_groups": [{"lr": 0.1, "params": [0]}]}
    return {"meta": meta, "state_dict": weights, "optimizer": optimizer}


def assert_same(a, b):
    """Equal values of equal types in equal order."""
    assert type(a) is type(b)
    if isinstance(a, torch.Tensor):
        assert a.dtype == b.dtype and torch.equal(a, b)
    elif isinstance(a, dict):
        assert list(a) == list(b)
        for key in a:
            assert_same(a[key], b[key])
        assert getattr(a, "_metadata", None) == getattr(b, "_metadata", None)
    elif isinstance(a, (list, tuple)):
        assert len(a) == len(b)
        for x, y in zip(a, b):
            assert_same(x, y)
    else:
        assert a == b


def through_a_file(data, path):
    torch.save(data, path)
    return torch.load(path, weights_only=True)


@pytest.mark.slow
@pytest.mark.parametrize("name", NAMES)
def test_the_way_back_gives_the_same_file(tmp_path, name):
    file = published(name)
    converted, unused = checkpoint_to_codetr(through_a_file(file, tmp_path / "a.pth"))
    assert "ema_backbone_conv1_weight" in unused and set(converted) == {"model", "published"}
    back = checkpoint_to_published(through_a_file(converted, tmp_path / "b.pth"))
    assert_same(through_a_file(back, tmp_path / "c.pth"), file)


def test_a_bare_state_dict(tmp_path):
    file = published("co_dino_5scale_vit_large_coco")["state_dict"]
    converted, _ = checkpoint_to_codetr(through_a_file(file, tmp_path / "a.pth"))
    assert_same(checkpoint_to_published(through_a_file(converted, tmp_path / "b.pth")), file)


@pytest.mark.parametrize("name", ["co_deformable_detr_r50_1x_coco", "co_dino_5scale_lsj_vit_large_lvis"])
def test_a_model_trained_here_gets_what_the_published_code_expects(name):
    file = published(name)
    ours = checkpoint_to_codetr(file)[0]["model"]
    expected = file["state_dict"].keys() - {"ema_backbone_conv1_weight"}
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.MODEL.EVA02.WINDOW_SIZE = 16
    cfg.MODEL.EVA02.IMAGE_SIZE = 1536
    if "vit" in name:
        with pytest.raises(InputError, match="--config-file"):
            checkpoint_to_published({"model": ours})
    average = torch.full((4,), 7.0)
    key = "query_head.decoder.class_embed.0.bias"
    result = checkpoint_to_published({"model": ours, "ema": {key: average}, "trainer": {}}, cfg)
    assert set(result) == {"meta", "state_dict"} and result["state_dict"].keys() == expected
    assert result["state_dict"]["query_head.cls_branches.0.bias"] is average


def test_other_files_are_refused():
    file = published("co_deformable_detr_r50_1x_coco")
    converted = checkpoint_to_codetr(file)[0]
    cases = [
        (checkpoint_to_codetr, converted, "already; --to-published"),
        (checkpoint_to_codetr, {"conv1.weight": torch.zeros(1)}, "no published Co-DETR"),
        (checkpoint_to_published, file, "leave out --to-published"),
        (checkpoint_to_published, {"model": {"conv1.weight": torch.zeros(1)}}, "no Co-DETR model"),
        (
            checkpoint_to_published,
            {"model": {**converted["model"], "backbone.model.conv_stem.weight": torch.zeros(1)}},
            "backbone.model.conv_stem.weight has no published name",
        ),
        (
            checkpoint_to_published,
            {**converted, "model": {k: v for k, v in converted["model"].items() if "atss" not in k}},
            "has no published name|changed since",
        ),
        (
            checkpoint_to_published,
            {**converted, "model": {k: v for k, v in converted["model"].items() if "neck" not in k}},
            "changed since its conversion",
        ),
    ]
    for function, data, message in cases:
        with pytest.raises(InputError, match=message):
            function(data)
