"""Focal losses that keep nothing but the logits for the backward pass.

A pyramid of 200 000 anchors with LVIS's 1203 classes has a gigabyte of logits: fvcore's focal loss, which wants a
one-hot target of their size, keeps eight times as much. Here all logits are treated as negatives, whose loss is
recomputed in the backward pass, and the few positives are corrected.
"""

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["focal_loss", "quality_focal_loss"]


def focal_loss(logits: Tensor, labels: Tensor, alpha: float = 0.25) -> Tensor:
    """Sigmoid focal loss with gamma = 2 against the one-hot label, summed over the classes.

    Source: RetinaNet (Lin et al., ICCV 2017), equation 5.

    Args:
        logits: [..., K] float32.
        labels: [...] int64, K for background.
        alpha: weight of positives; negatives have 1 - alpha.

    Returns:
        [...]
    """
    x, positive = _at_label(logits, labels)
    p = x.sigmoid()
    correction = alpha * (1 - p).square() * F.softplus(-x) - (1 - alpha) * p.square() * F.softplus(x)
    return (1 - alpha) * _sum_of_negatives(logits) + correction * positive


def quality_focal_loss(logits: Tensor, labels: Tensor, quality: Tensor) -> Tensor:
    """Quality focal loss with beta = 2, summed over the classes.

    The target of a positive is the quality of its box at its class; the loss is the binary cross-entropy times the
    squared distance of the probability from the target. Source: Generalized Focal Loss (Li et al., NeurIPS 2020),
    equation 2.

    Args:
        logits: [..., K] float32.
        labels: [...] int64, K for background.
        quality: [...] in [0, 1], of no meaning where background.

    Returns:
        [...]
    """
    x, positive = _at_label(logits, labels)
    p = x.sigmoid()
    correction = F.binary_cross_entropy_with_logits(x, quality, reduction="none") * (quality - p).square()
    correction = correction - p.square() * F.softplus(x)
    return _sum_of_negatives(logits) + correction * positive


def _at_label(logits: Tensor, labels: Tensor) -> tuple[Tensor, Tensor]:
    """The logit of the label (of any class where background), and whether it is one."""
    num_classes = logits.shape[-1]
    return logits.gather(-1, labels.clamp(max=num_classes - 1).unsqueeze(-1)).squeeze(-1), labels < num_classes


def _sum_of_negatives(logits: Tensor) -> Tensor:
    def loss(x: Tensor) -> Tensor:
        return (x.sigmoid().square() * F.softplus(x)).sum(-1)

    if not torch.is_grad_enabled():
        return loss(logits)
    return checkpoint(loss, logits, use_reentrant=False, preserve_rng_state=False)
