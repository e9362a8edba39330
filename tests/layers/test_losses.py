import pytest
import torch
import torch.nn.functional as F
from torchvision.ops import sigmoid_focal_loss

from codetr_d2.layers import focal_loss, quality_focal_loss


def make_inputs(dtype):
    """Logits [3, 40, 5], and labels of which some are background."""
    logits = (torch.randn(3, 40, 5, dtype=dtype) * 3).requires_grad_()
    return logits, torch.randint(6, (3, 40)), torch.rand(3, 40, dtype=dtype)


def value_and_gradient(loss, logits):
    weights = torch.linspace(0.5, 2, loss.numel(), dtype=loss.dtype).view_as(loss)
    return loss, *torch.autograd.grad((loss * weights).sum(), logits)


def test_focal_loss_equals_torchvision():
    logits, labels, _ = make_inputs(torch.float64)
    one_hot = F.one_hot(labels, 6)[..., :-1].double()
    expected = sigmoid_focal_loss(logits, one_hot, alpha=0.25, gamma=2).sum(-1)
    ours = value_and_gradient(focal_loss(logits, labels), logits)
    for value, reference in zip(ours, value_and_gradient(expected, logits)):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)


def test_quality_focal_loss_equals_its_definition():
    logits, labels, quality = make_inputs(torch.float64)
    target = F.one_hot(labels, 6)[..., :-1] * quality.unsqueeze(-1)
    p = logits.sigmoid()
    cross_entropy = -(target * p.log() + (1 - target) * (1 - p).log())
    expected = (cross_entropy * (target - p).abs() ** 2).sum(-1)
    ours = value_and_gradient(quality_focal_loss(logits, labels, quality), logits)
    for value, reference in zip(ours, value_and_gradient(expected, logits)):
        torch.testing.assert_close(value, reference, rtol=1e-4, atol=1e-5)


def test_quality_focal_loss_is_smallest_at_the_quality():
    quality = torch.tensor([0.0, 0.3, 1.0]).expand(241, 3)
    logits = torch.linspace(-6, 6, 241)[:, None, None].expand(-1, 3, 1)
    best = quality_focal_loss(logits, torch.zeros(241, 3, dtype=torch.int64), quality).argmin(0)
    torch.testing.assert_close(logits[best, 0, 0].sigmoid(), quality[0], atol=0.02, rtol=0)


@pytest.mark.parametrize("loss", [focal_loss, lambda x, y: quality_focal_loss(x, y, torch.full((2,), 0.5).double())])
def test_gradients(loss):
    logits = torch.randn(2, 3, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: loss(x, torch.tensor([1, 3])), logits)


@pytest.mark.parametrize("logit", [-80.0, 80.0])
def test_extreme_logits(logit):
    logits = torch.full((2, 2), logit, requires_grad=True)
    labels = torch.tensor([0, 2])
    for loss in (focal_loss(logits, labels), quality_focal_loss(logits, labels, torch.tensor([1.0, 0.0]))):
        [gradient] = torch.autograd.grad(loss.sum(), logits)
        assert torch.isfinite(loss).all() and torch.isfinite(gradient).all()


def test_nothing_but_the_logits_is_kept():
    """Of the size of the logits, the graph holds the logits alone."""
    logits = torch.randn(1000, 50, requires_grad=True)
    kept = {}

    def pack(tensor):
        kept[tensor.data_ptr()] = tensor.numel()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda x: x):
        focal_loss(logits, torch.randint(51, (1000,)))
    large = [pointer for pointer, size in kept.items() if size >= logits.numel()]
    assert large in ([], [logits.data_ptr()])
