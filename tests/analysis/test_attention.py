"""Attention as maps: against sampling written out by hand, and against what the modules themselves compute."""

import json

import pytest
import torch
from PIL import Image

from codetr_d2.analysis.attention import cross_attention, plain_weights, scatter_to_tokens
from tests.small_model import build, make_batch


def test_a_point_gives_its_weight_to_the_cells_around_it():
    # Of the first level, 1 x 4 cells, whose centres are at 1/8, 3/8, ...: on a centre, and a quarter of a cell beside
    # another. Of the second, 1 x 1: on the centre, and outside.
    locations = torch.tensor([[[0.375, 0.5], [0.6875, 0.5]], [[0.5, 0.5], [-1.0, 0.5]]]).view(1, 1, 1, 2, 2, 2)
    weights = torch.tensor([[0.1, 0.4], [0.2, 0.3]]).view(1, 1, 1, 2, 2)
    tokens = scatter_to_tokens(locations, weights, [(1, 4), (1, 1)])
    torch.testing.assert_close(tokens, torch.tensor([[0.0, 0.1, 0.3, 0.1, 0.2]]))


def test_all_queries_and_heads_are_summed():
    shapes = [(3, 4), (2, 2)]
    locations, weights = 0.2 + 0.6 * torch.rand(2, 5, 3, 2, 4, 2), torch.rand(2, 5, 3, 2, 4)
    tokens = scatter_to_tokens(locations, weights, shapes)
    expected = torch.zeros(2, 16)
    for b, q, h, level, p in torch.cartesian_prod(*map(torch.arange, weights.shape)).tolist():
        height, width = shapes[level]
        x, y = (locations[b, q, h, level, p] * torch.tensor([width, height]) - 0.5).tolist()
        for row in range(height):
            for column in range(width):
                share = max(0, 1 - abs(x - column)) * max(0, 1 - abs(y - row))
                expected[b, 12 * level + row * width + column] += weights[b, q, h, level, p] * share
    torch.testing.assert_close(tokens, expected)


def test_plain_weights_are_those_of_attention():
    q, k, v = torch.randn(2, 3, 5, 8), torch.randn(2, 3, 7, 8), torch.randn(2, 1, 7, 8)
    mask = torch.rand(2, 1, 1, 7) > 0.3
    # The values are the same for all heads, so that the mean over these is that of the weights.
    attended = torch.nn.functional.scaled_dot_product_attention(q, k, v.expand(-1, 3, -1, -1), attn_mask=mask).mean(1)
    torch.testing.assert_close(plain_weights(q, k, mask) @ v[:, 0], attended)


@pytest.mark.slow
@pytest.mark.parametrize("head", ["CoDeformableDETRHead", "CoDINOHead", "ConditionalDETRHead", "DABDETRHead"])
def test_every_detector(head):
    model = build("MODEL.CODETR.QUERY_HEAD", head).eval()
    images = model.preprocess(make_batch(1))
    with torch.no_grad():
        memory = model.encode(model.features(images))
        expected = model.predict(memory)
    output, layers = cross_attention(model, memory)
    assert torch.equal(output.boxes, expected.boxes)
    assert len(layers) == 2
    for layer in layers:
        torch.testing.assert_close(layer.weights.sum(1), torch.ones(20))  # of 20 queries
        assert layer.points.shape == (*layer.weights.shape, 2)
        assert layer.tokens.shape == memory.tokens.shape[1:2]
        assert (layer.tokens >= 0).all() and layer.tokens.sum() <= 20.001
    assert not any(x._forward_pre_hooks for x in model.modules())


@pytest.mark.slow
def test_models_side_by_side(analyze, write_run, write_data, tmp_path):
    data = write_data()
    models = [f"--model={name}={write_run(name, data)}" for name in ("first", "second")]
    output = tmp_path / "out"
    analyze(["attention", *models, f"--output={output}", "--images=2"])
    rows = json.loads((output / "attention.json").read_text())
    assert [(x["model"], x["source"]) for x in rows] == [("first", "cross-attention"), ("second", "cross-attention")]
    assert rows[0]["area"] == rows[1]["area"]  # the same random weights
    for name in ("attention", "attention_maps", "attention_queries"):
        assert Image.open(output / f"{name}.png").width > 500
