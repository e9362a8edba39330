"""Arithmetic on box coordinates that torchvision does not have."""

import math

import torch
from torch import Tensor

__all__ = ["inverse_sigmoid", "paired_giou", "paired_iou", "pairwise_giou", "sine_embedding"]


def inverse_sigmoid(x: Tensor, eps: float) -> Tensor:
    """Logit of ``x`` clamped to [0, 1], with numerator and denominator kept at ``eps`` or more.

    Not ``torch.logit(x, eps)``: that one clamps both ends of x, which differs by up to eps.
    """
    x = x.clamp(0, 1)
    return torch.log(x.clamp(min=eps) / (1 - x).clamp(min=eps))


def sine_embedding(coordinates: Tensor, num_channels: int, temperature: float = 10000.0) -> Tensor:
    """Sine-cosine embedding of each coordinate.

    Args:
        coordinates: [..., N], normalised to [0, 1].
        num_channels: channels for each coordinate; sine and cosine alternate.
        temperature: base of the wavelengths.

    Returns:
        [..., N * num_channels], coordinate by coordinate.
    """
    exponent = torch.arange(num_channels // 2, dtype=torch.float32, device=coordinates.device) * 2 / num_channels
    angles = coordinates.unsqueeze(-1) * (2 * math.pi) / temperature**exponent  # [..., N, num_channels / 2]
    return torch.stack((angles.sin(), angles.cos()), dim=-1).flatten(-3)


def paired_iou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-6) -> Tensor:
    """IoU of boxes that broadcast against each other; arguments as of :func:`paired_giou`. Returns [...] in [0, 1]."""
    intersection, union = _intersection_and_union(boxes1, boxes2, eps)
    return intersection / union


def paired_giou(boxes1: Tensor, boxes2: Tensor, eps: float = 1e-6) -> Tensor:
    """Generalised IoU of boxes that broadcast against each other.

    Args:
        boxes1, boxes2: [..., 4] xyxy, broadcastable.
        eps: floor of union and enclosing area, so that boxes without area give a finite value and gradient.

    Returns:
        [...] in [-1, 1].
    """
    intersection, union = _intersection_and_union(boxes1, boxes2, eps)
    enclosing = torch.maximum(boxes1[..., 2:], boxes2[..., 2:]) - torch.minimum(boxes1[..., :2], boxes2[..., :2])
    enclosing_area = enclosing.clamp(min=0).prod(-1).clamp(min=eps)
    return intersection / union - (enclosing_area - union) / enclosing_area


def _intersection_and_union(boxes1: Tensor, boxes2: Tensor, eps: float) -> tuple[Tensor, Tensor]:
    overlap = torch.minimum(boxes1[..., 2:], boxes2[..., 2:]) - torch.maximum(boxes1[..., :2], boxes2[..., :2])
    intersection = overlap.clamp(min=0).prod(-1)
    area1 = (boxes1[..., 2:] - boxes1[..., :2]).prod(-1)
    area2 = (boxes2[..., 2:] - boxes2[..., :2]).prod(-1)
    return intersection, (area1 + area2 - intersection).clamp(min=eps)


def pairwise_giou(boxes1: Tensor, boxes2: Tensor) -> Tensor:
    """Generalised IoU of all pairs: boxes [..., N, 4] and [..., M, 4] xyxy -> [..., N, M]."""
    return paired_giou(boxes1.unsqueeze(-2), boxes2.unsqueeze(-3))
