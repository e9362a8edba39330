import json
import math
from pathlib import Path

import pytest
import torch

from codetr_d2.checkpoint.published import (
    codetr_to_published,
    computed_tensors,
    describe,
    is_published,
    published_to_codetr,
)

KEYS = Path(__file__).parents[1] / "reference" / "data" / "keys"
FILES = sorted(path.stem for path in KEYS.glob("co_*.json"))


def published(name):
    """A state dict of the published names and shapes, of distinct tensors without memory."""
    shapes = json.loads((KEYS / f"{name}.json").read_text())
    del shapes["_meta"]
    return {name: torch.zeros(()).expand(shape) for name, shape in shapes.items()}


def test_every_published_config_has_a_key_file():
    index = json.loads((KEYS / "index.json").read_text())
    assert len(index["config_to_file"]) == 30 and not index["not_built"]
    assert {Path(file).stem for file in index["config_to_file"].values()} == set(FILES)


@pytest.mark.parametrize("name", FILES)
def test_round_trip(name):
    weights = published(name)
    ours, unused = published_to_codetr(weights)
    assert is_published(weights) and not is_published(ours)
    assert all(key.endswith(("num_batches_tracked", ".freqs_cos", ".freqs_sin")) for key in unused)
    back = codetr_to_published(ours)
    assert back.keys() == weights.keys() - unused.keys()
    assert all(back[key].shape == weights[key].shape for key in back)
    assert all(back[key] is weights[key] for key in back if not key.endswith("head_pos_embed.weight"))


@pytest.mark.parametrize(
    "file, theirs, ours",
    [
        ("co_deformable_detr_r50_1x_coco", "backbone.layer3.5.bn2.bias", "backbone.res4.5.conv2.norm.bias"),
        (
            "co_deformable_detr_r50_1x_coco",
            "query_head.query_embedding.weight",
            "query_head.query_content.weight",
        ),
        (
            "co_dino_5scale_lsj_r50_1x_coco",
            "query_head.transformer.query_embed.weight",
            "query_head.query_content.weight",
        ),
        (
            "co_dino_5scale_lsj_r50_1x_coco",
            "query_head.transformer.decoder.ref_point_head.2.bias",
            "query_head.decoder.position_head.2.bias",
        ),
        (
            "co_dino_5scale_lsj_r50_1x_lvis",
            "query_head.label_embedding.weight",
            "query_head.denoising.label_embed.weight",
        ),
        (
            "co_deformable_detr_swin_tiny_1x_coco",
            "backbone.patch_embed.proj.weight",
            "backbone.patch_embed.proj.weight",
        ),
        ("co_dino_5scale_vit_large_coco", "backbone.patch_embed.proj.weight", "backbone.net.patch_embed.proj.weight"),
        ("co_dino_5scale_vit_large_coco", "backbone.blocks.3.mlp.w3.bias", "backbone.net.blocks.3.mlp.w3.bias"),
        ("co_dino_5scale_vit_large_coco", "neck.p6.7.weight", "backbone.p6.7.weight"),
        (
            "co_dino_5scale_vit_large_coco",
            "roi_head.0.bbox_head.shared_convs.3.gn.weight",
            "auxiliary_heads.roi.roi_heads.box_head.conv4.norm.weight",
        ),
        (
            "co_dino_5scale_vit_large_coco",
            "roi_head.0.bbox_head.shared_convs.0.conv.weight",
            "auxiliary_heads.roi.roi_heads.box_head.conv1.weight",
        ),
        (
            "co_deformable_detr_mask_r50_1x_coco",
            "roi_head.0.mask_head.convs.3.conv.bias",
            "auxiliary_heads.roi.roi_heads.mask_head.mask_fcn4.bias",
        ),
        (
            "co_deformable_detr_mask_r50_1x_coco",
            "roi_head.0.mask_head.conv_logits.weight",
            "auxiliary_heads.roi.roi_heads.mask_head.predictor.weight",
        ),
        (
            "co_dino_5scale_vit_large_coco_instance",
            "mask_iou_head.fc_mask_iou.weight",
            "mask_head.iou_head.fc_mask_iou.weight",
        ),
        (
            "co_dino_5scale_vit_large_coco_instance",
            "mask_head.stages.0.fuse_conv.0.bias",
            "mask_head.stages.0.fuse_conv.0.bias",
        ),
    ],
)
def test_names(file, theirs, ours):
    weights = published(file)
    assert published_to_codetr(weights)[0][ours] is weights[theirs]


@pytest.mark.parametrize("heads", [["roi", "atss"], ["atss", "roi"], ["atss"], ["roi"]])
@pytest.mark.parametrize("numbered", [False, True])  # older files number them in the order of the heads
def test_positive_queries_follow_their_heads(heads, numbered):
    """Of a model trained with AUX_HEADS in any order; the published order is roi, atss, whichever of them there are."""
    ours = published_to_codetr(published("co_deformable_detr_r50_1x_coco"))[0]
    value = {"roi": torch.tensor([1.0]), "atss": torch.tensor([2.0])}
    trained = {name: x for name, x in ours.items() if "auxiliary_heads" not in name and "positive_queries" not in name}
    for k, head in enumerate(heads):
        trained[f"auxiliary_heads.{head}.{'cls_score' if head == 'atss' else 'roi_heads.box_head.fc1'}.bias"] = value[
            head
        ]
        for name in ("head_embed", "box_proj.bias", "feature_norm.weight"):
            trained[f"query_head.positive_queries.{k if numbered else head}.{name}"] = value[head]
    back = codetr_to_published(trained)
    in_order = [head for head in ("roi", "atss") if head in heads]
    assert back["query_head.transformer.head_pos_embed.weight"].tolist() == [value[x].tolist() for x in in_order]
    for k, head in enumerate(in_order):
        assert back[f"query_head.transformer.aux_pos_trans.{k}.bias"] is value[head]
        assert back[f"query_head.transformer.pos_feats_norm.{k}.weight"] is value[head]
    again, unused = published_to_codetr(back)
    assert not unused
    for head in heads:
        assert again[f"query_head.positive_queries.{head}.box_proj.bias"] is value[head]
        assert torch.equal(again[f"query_head.positive_queries.{head}.head_embed"], value[head])


def test_foreign_names_are_reported():
    averaged = "ema_query_head_label_embedding_weight"
    ours, unused = published_to_codetr({"query_head.something.weight": torch.zeros(1), averaged: torch.zeros(1)})
    assert not ours and list(unused) == ["query_head.something.weight", averaged]
    lines = describe({**unused, **{f"x{i}": "r" for i in range(9)}})
    assert lines[0] == "1 (no parameter of this model): query_head.something.weight"
    assert "averag" in lines[1] and lines[2] == "9 (r): x0, x1, x2, x3, ..."
    for name in ("something", "query_head.positive_queries.0.box_proj.weight"):
        with pytest.raises(KeyError, match=name):
            codetr_to_published({"query_head.decoder.class_embed.0.bias": torch.zeros(1), name: torch.zeros(1)})


@pytest.mark.parametrize(
    "name, window, global_size",
    [
        ("co_deformable_detr_r50_1x_coco", 0, 0),
        ("co_deformable_detr_swin_tiny_1x_coco", 0, 0),
        ("co_dino_5scale_vit_large_coco", 24, 0),
        ("co_dino_5scale_lsj_vit_large_lvis", 16, 96),
    ],
)
def test_computed_tensors_have_the_published_names_and_shapes(name, window, global_size):
    weights = published(name)
    _, unused = published_to_codetr(weights)
    blocks = [3, 7, 11, 15, 19, 23]
    if global_size:
        blocks = [i for i in range(24) if len(weights[f"backbone.blocks.{i}.attn.rope.freqs_cos"]) == 96**2]
    computed = computed_tensors({k: v for k, v in weights.items() if k not in unused}, window, blocks, global_size)
    assert computed.keys() == unused.keys()
    assert all(computed[key].shape == weights[key].shape for key in computed)


def test_rotary_tables():
    weights = {"backbone.blocks.0.norm1.weight": torch.zeros(1)}
    tables = computed_tensors(weights, window_size=24)
    cos, sin = tables["backbone.rope_win.freqs_cos"], tables["backbone.rope_win.freqs_sin"]
    for row, column, channel in ((0, 0, 0), (3, 5, 0), (3, 5, 1), (3, 5, 13), (23, 7, 31), (3, 5, 32), (23, 7, 63)):
        position = 16 * (row if channel < 32 else column) / 24
        angle = position * 10000 ** (-2 * (channel % 32 // 2) / 32)
        assert cos[row * 24 + column, channel].item() == pytest.approx(math.cos(angle), abs=1e-5)
        assert sin[row * 24 + column, channel].item() == pytest.approx(math.sin(angle), abs=1e-5)
