import pytest
import torch
from torch.nn import functional as F

from codetr_d2.layers import SinePositionEncoding
from codetr_d2.modeling.pyramid import build_pyramid
from codetr_d2.modeling.transformer import PlainEncoder

CONDITIONAL = {}
DAB = {"scales_position": True, "prelu": True}


@pytest.fixture(params=[CONDITIONAL, DAB], ids=["conditional_detr", "dab_detr"])
def encoder(request):
    return PlainEncoder(
        position_encoding=SinePositionEncoding(32, temperature=20.0, offset=0.0),
        embed_dim=32,
        num_layers=2,
        num_heads=4,
        ffn_dim=64,
        **request.param,
    )


def make_pyramid(level, *valid):
    """A pyramid of one level whose images are valid in their top left (rows, columns)."""
    return build_pyramid([level], [16], [(16 * h, 16 * w) for h, w in valid], tuple(16 * x for x in level.shape[-2:]))


def test_padding_changes_nothing(encoder):
    """An image gives the same alone as in a batch, padded with anything."""
    level = torch.randn(2, 32, 4, 6)
    padded = level.clone()
    padded[1, :, 3:] = padded[1, :, :, 5:] = 9.0
    together = encoder(make_pyramid(padded, (4, 6), (3, 5))).unflatten(1, (4, 6))
    first = encoder(make_pyramid(level[:1], (4, 6))).unflatten(1, (4, 6))
    second = encoder(make_pyramid(level[1:, :, :3, :5], (3, 5))).unflatten(1, (3, 5))
    torch.testing.assert_close(together[:1], first)
    torch.testing.assert_close(together[1:, :3, :5], second)


def test_every_token_sees_all_and_where_they_are(encoder):
    level = torch.randn(1, 32, 4, 6, requires_grad=True)
    output = encoder(make_pyramid(level, (4, 6)))
    output[0, 0].square().sum().backward()
    assert (level.grad[0].abs().sum(0) > 0).all()
    # Without positions, tokens in another order would give the same in that order.
    with torch.no_grad():
        assert not torch.allclose(
            encoder(make_pyramid(level.flip(3), (4, 6))), output.unflatten(1, (4, 6)).flip(2).flatten(1, 2), atol=1e-3
        )


def test_gradients_with_and_without_recomputing(encoder):
    encoder.train()
    pyramid = make_pyramid(torch.randn(2, 32, 4, 6), (4, 6), (2, 3))
    gradients = []
    for encoder.activation_checkpointing in (False, True):
        encoder.zero_grad()
        encoder(pyramid).square().sum().backward()
        gradients.append([p.grad.clone() for p in encoder.parameters()])
    for plain, recomputed in zip(*gradients):
        assert plain.isfinite().all() and torch.equal(plain, recomputed)


@pytest.mark.parametrize("slope", [0.0, 1.0])
def test_prelu(slope):
    """A slope of 0 is a ReLU, and one of 1 nothing at all."""
    encoder = PlainEncoder(
        position_encoding=SinePositionEncoding(32, 20.0, 0.0),
        embed_dim=32,
        num_layers=1,
        num_heads=4,
        ffn_dim=64,
        **DAB,
    )
    ffn, x = encoder.layers[0].ffn, torch.randn(3, 32)
    ffn.prelu.weight.data.fill_(slope)
    hidden = ffn.linear1(x)
    torch.testing.assert_close(ffn(x), ffn.linear2(hidden if slope else F.relu(hidden)))
