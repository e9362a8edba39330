import torch
from torch import nn

from codetr_d2.modeling.pyramid import FeaturePyramid, build_pyramid
from codetr_d2.modeling.transformer import DeformableEncoder
from codetr_d2.modeling.transformer.perceptrons import FeedForward

OPTIONS = {"embed_dim": 32, "num_layers": 2, "num_heads": 4, "num_levels": 2, "num_points": 2, "ffn_dim": 64}


def pyramid_of(maps: list[torch.Tensor], valid: list[tuple[int, int]]) -> FeaturePyramid:
    """A one-image pyramid whose levels are valid in their top left (height, width)."""
    (h, w), _ = valid
    batch_shape = tuple(8 * x for x in maps[0].shape[-2:])
    pyramid = build_pyramid(maps, [8, 16], [(8 * h, 8 * w)], batch_shape)
    for mask, (h, w) in zip(pyramid.geometry.level_padding, valid):
        assert mask[0].logical_not().sum() == h * w and not mask[0, :h, :w].any()
    return pyramid


def test_reference_points():
    maps = [torch.randn(1, 32, 4, 8), torch.randn(1, 32, 2, 4)]
    points = pyramid_of(maps, [(2, 4), (1, 2)]).geometry.reference_points
    assert points.shape == (1, 40, 2, 2)
    # The cell's centre as a share of the padded map, the same on both levels since their valid shares are equal.
    torch.testing.assert_close(points[0, 8 * 1 + 3], torch.tensor([[3.5 / 8, 1.5 / 4]]).expand(2, 2))
    torch.testing.assert_close(points[0, 32 + 1], torch.tensor([[1.5 / 4, 0.5 / 2]]).expand(2, 2))


def test_padding_changes_nothing():
    """The same image with and without padding around it; what stands in the padding does not matter."""
    encoder = DeformableEncoder(**OPTIONS)
    for layer in encoder.layers:
        torch.nn.init.normal_(layer.self_attn.sampling_offsets.weight, std=0.5)
        torch.nn.init.normal_(layer.self_attn.attention_weights.weight, std=0.5)
    maps = [torch.randn(1, 32, 4, 6), torch.randn(1, 32, 2, 3)]
    padded = [torch.nn.functional.pad(x, (0, x.shape[-1], 0, x.shape[-2]), value=9.0) for x in maps]
    position = [torch.randn(1, 32, 4, 6), torch.randn(1, 32, 2, 3)]
    padded_position = [torch.nn.functional.pad(x, (0, x.shape[-1], 0, x.shape[-2])) for x in position]
    sizes = [(4, 6), (2, 3)]
    alone, together = pyramid_of(maps, sizes), pyramid_of(padded, sizes)
    expected = alone.with_tokens(encoder(alone, pyramid_of(position, sizes).tokens)).maps()
    output = together.with_tokens(encoder(together, pyramid_of(padded_position, sizes).tokens)).maps()
    for ours, theirs, (h, w) in zip(output, expected, sizes):
        torch.testing.assert_close(ours[..., :h, :w], theirs, rtol=1e-4, atol=1e-5)


def test_activation_checkpointing_gives_the_same_gradients():
    encoder = DeformableEncoder(**OPTIONS).train()
    pyramid = pyramid_of([torch.randn(1, 32, 4, 6), torch.randn(1, 32, 2, 3)], [(4, 6), (2, 3)])
    gradients = []
    for encoder.activation_checkpointing in (False, True):
        encoder.zero_grad()
        encoder(pyramid, torch.zeros_like(pyramid.tokens)).square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    for plain, recomputed in zip(*gradients):
        assert torch.equal(plain, recomputed)


def test_feed_forward():
    """Against plain layers, also where dropout counts."""
    ffn = FeedForward(8, 16, dropout=0.5).double()
    plain = nn.Sequential(ffn.linear1, nn.ReLU(), nn.Dropout(0.5), ffn.linear2)
    x = torch.randn(2, 30, 8, dtype=torch.float64)
    for module in (ffn, plain):
        module.eval()
    torch.testing.assert_close(ffn(x), plain(x))
    results = []
    for module in (ffn, plain):
        module.train()
        torch.manual_seed(0)
        results.append(module(x))
    torch.testing.assert_close(*results)
