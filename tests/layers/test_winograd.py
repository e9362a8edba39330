import pytest
import torch
from torch.nn import functional as F

from codetr_d2.layers import conv3x3, winograd


def outputs_and_gradients(convolution, x, weight, bias, gradient):
    inputs = [t for t in (x, weight, bias) if t is not None and t.requires_grad]
    output = convolution(x, weight, bias)
    return [output, *torch.autograd.grad(output, inputs, gradient)]


def direct(x, weight, bias):
    return F.conv2d(x, weight, bias, padding=1)


@pytest.fixture
def everywhere(monkeypatch):
    """Convolutions of any size take Winograd's algorithm."""
    monkeypatch.setattr(winograd, "MIN_CHANNELS", 1)
    monkeypatch.setattr(winograd, "MIN_CELLS", 1)


@pytest.mark.parametrize("size", [(8, 12), (5, 7), (4, 4), (1, 1), (1, 9), (3, 2), (17, 10)])
@pytest.mark.parametrize("batch_size, channels, out_channels, has_bias", [(1, 3, 5, True), (2, 8, 4, False)])
def test_equals_the_direct_convolution(everywhere, size, batch_size, channels, out_channels, has_bias):
    torch.manual_seed(0)
    x = torch.randn(batch_size, channels, *size, requires_grad=True)
    weight = torch.randn(out_channels, channels, 3, 3, requires_grad=True)
    bias = torch.randn(out_channels, requires_grad=True) if has_bias else None
    gradient = torch.randn(batch_size, out_channels, *size)
    ours = outputs_and_gradients(conv3x3, x, weight, bias, gradient)
    expected = outputs_and_gradients(direct, *(t if t is None else t.double() for t in (x, weight, bias)), gradient)
    assert "_Winograd" in type(ours[0].grad_fn).__name__
    for a, b in zip(ours, expected):
        assert a.shape == b.shape
        assert (a - b).abs().max() <= 2e-5 * b.abs().max()


@pytest.mark.parametrize("needed", [(True, False), (False, True)])
def test_gradients_that_are_not_needed(everywhere, needed):
    torch.manual_seed(0)
    x, weight = torch.randn(1, 4, 8, 8), torch.randn(4, 4, 3, 3)
    for tensor, is_needed in zip((x, weight), needed):
        tensor.requires_grad_(is_needed)
    conv3x3(x, weight).sum().backward()
    assert [t.grad is not None for t in (x, weight)] == list(needed)


def test_maps_in_any_layout(everywhere):
    torch.manual_seed(0)
    x, weight = torch.randn(2, 4, 9, 11), torch.randn(6, 4, 3, 3, requires_grad=True)
    expected = conv3x3(x, weight)
    found = conv3x3(x.contiguous(memory_format=torch.channels_last), weight)
    assert torch.equal(found, expected) and found.is_contiguous(memory_format=torch.channels_last)


def test_an_error_of_a_wide_convolution_is_small():
    """As the heads have them; that of the direct one is about 2e-6."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, 256, 64, 65), torch.randn(256, 256, 3, 3, requires_grad=True)
    expected = direct(x.double(), weight.double(), None)
    found = conv3x3(x, weight)
    assert "_Winograd" in type(found.grad_fn).__name__
    assert (found - expected).abs().max() <= 2e-5 * expected.abs().max()


@pytest.mark.parametrize(
    "channels, size, dtype, training, autocasts",
    [
        (128, (64, 64), torch.float32, False, False),
        (128, (64, 64), torch.bfloat16, True, False),
        (128, (64, 64), torch.float32, True, True),
        (128, (62, 64), torch.float32, True, False),
        (127, (64, 64), torch.float32, True, False),
        (128, (0, 64), torch.float32, True, False),
    ],
)
def test_everything_else_is_left_to_pytorch(channels, size, dtype, training, autocasts):
    """To the last bit."""
    torch.manual_seed(0)
    x, weight = torch.randn(1, channels, *size, dtype=dtype), torch.randn(128, channels, 3, 3, dtype=dtype)
    if 0 in size:
        x = x.new_zeros((0, channels, 64, 64))
    weight.requires_grad_()
    with torch.set_grad_enabled(training), torch.autocast("cpu", enabled=autocasts):
        assert torch.equal(conv3x3(x, weight), direct(x, weight, None))
