"""Losses that fvcore does not have."""

import torch.nn.functional as F
from torch import Tensor

__all__ = ["quality_focal_loss"]


def quality_focal_loss(logits: Tensor, quality: Tensor, beta: float = 2.0) -> Tensor:
    """Quality focal loss: binary cross-entropy with a soft target, weighted by the distance from it.

    Source: Generalized Focal Loss (Li et al., NeurIPS 2020), equation 2.

    Args:
        logits: of any shape.
        quality: targets in [0, 1] of the same shape: for a positive the IoU of its box at its class, 0 elsewhere.
        beta: exponent of the weight.

    Returns:
        the loss of every logit.
    """
    weight = (quality - logits.sigmoid()).abs().pow(beta)
    return F.binary_cross_entropy_with_logits(logits, quality, reduction="none") * weight
