import math

import pytest
import torch
from torch import nn

from codetr_d2.engine import ModelEMA


def make_model():
    model = nn.Sequential(nn.Linear(3, 4), nn.BatchNorm1d(4), nn.Linear(4, 3))
    model[2].bias.requires_grad_(False)
    return model


def change(model, step):
    generator = torch.Generator().manual_seed(step)
    with torch.no_grad():
        for weight in [p for p in model.parameters() if p.requires_grad] + [model[1].running_mean]:
            weight += torch.randn(weight.shape, generator=generator)


def test_average_follows_the_published_formula():
    model = make_model()
    ema = ModelEMA(model, decay=0.9999, warmup_iters=2000)
    expected = {name: value.double() for name, value in model.state_dict().items() if value.is_floating_point()}
    for step in range(30):
        change(model, step)
        ema.update(step)
        momentum = (1 - 1e-4) * math.exp(-(1 + step) / 2000) + 1e-4
        for name in expected:
            expected[name] = (1 - momentum) * expected[name] + momentum * model.state_dict()[name].double()
    state = ema.state_dict()
    assert "1.num_batches_tracked" not in state and "2.bias" not in state and "1.running_mean" in state
    for name, value in state.items():
        torch.testing.assert_close(value.double(), expected[name], rtol=1e-5, atol=1e-5)


def test_momentum_falls_to_one_minus_decay():
    ema = ModelEMA(make_model(), decay=0.999, warmup_iters=10)
    assert ema.momentum(0) == pytest.approx(0.999 * math.exp(-0.1) + 0.001)
    assert ema.momentum(10000) == pytest.approx(0.001)
    assert ModelEMA(make_model(), decay=0.9, warmup_iters=0).momentum(0) == pytest.approx(0.1)


def test_applied_exchanges_the_weights_and_gives_them_back():
    model = make_model()
    ema = ModelEMA(model, 0.9, 1)
    change(model, 0)
    raw = {name: value.clone() for name, value in model.state_dict().items()}
    average = {name: value.clone() for name, value in ema.state_dict().items()}
    with pytest.raises(KeyError), ema.applied():
        for name, value in average.items():
            assert torch.equal(model.state_dict()[name], value)
        assert not torch.equal(raw["0.weight"], average["0.weight"])
        raise KeyError
    for name, value in model.state_dict().items():
        assert torch.equal(value, raw[name])
    for name, value in ema.state_dict().items():
        assert torch.equal(value, average[name])


def test_a_shared_weight_is_averaged_once_and_saved_under_all_its_names():
    model = nn.ModuleList([nn.Linear(2, 2), nn.Linear(2, 2)])
    model[1].weight = model[0].weight
    ema = ModelEMA(model, 0.5, 0)
    start = model[0].weight.detach().clone()
    with torch.no_grad():
        model[0].weight += 1
    ema.update(0)
    state = ema.state_dict()
    torch.testing.assert_close(state["0.weight"], start + 0.5)
    assert state["1.weight"] is state["0.weight"]


def test_state_goes_through_a_checkpoint():
    model = make_model()
    ema = ModelEMA(model, 0.9, 1)
    change(model, 0)
    ema.update(0)
    other = ModelEMA(make_model(), 0.9, 1)
    other.load_state_dict(ema.state_dict())
    assert other.loaded and not ema.loaded
    for name, value in other.state_dict().items():
        assert torch.equal(value, ema.state_dict()[name])
    ema.restart()
    assert torch.equal(ema.state_dict()["0.weight"], model[0].weight)
