import pytest
import torch
import torch.nn.functional as F

from codetr_d2.layers import quality_focal_loss


def test_is_smallest_at_the_quality():
    quality = torch.tensor([0.0, 0.3, 1.0])
    logits = torch.linspace(-6, 6, 241)[:, None].expand(-1, 3)
    best = quality_focal_loss(logits, quality.expand_as(logits)).argmin(0)
    torch.testing.assert_close(logits[best, [0, 1, 2]].sigmoid(), quality, atol=0.02, rtol=0)


def test_beta_0_is_cross_entropy():
    logits, quality = torch.randn(7), torch.rand(7)
    expected = F.binary_cross_entropy_with_logits(logits, quality, reduction="none")
    torch.testing.assert_close(quality_focal_loss(logits, quality, beta=0.0), expected)


@pytest.mark.parametrize("logit", [-80.0, 80.0])
def test_extreme_logits(logit):
    logits = torch.full((2,), logit, requires_grad=True)
    loss = quality_focal_loss(logits, torch.tensor([0.0, 1.0]))
    loss.sum().backward()
    assert torch.isfinite(loss).all() and torch.isfinite(logits.grad).all()
