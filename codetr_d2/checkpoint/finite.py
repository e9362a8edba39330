"""Weights that are not finite: of a training that has diverged."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from ..errors import InputError

__all__ = ["brief", "check_finite", "not_finite"]


def not_finite(tensors: Mapping[str, Any]) -> list[str]:
    """The names of the tensors that hold NaN or infinity. Waits for the device once, where all is well."""
    floats = {
        name: x for name, x in tensors.items() if isinstance(x, Tensor) and x.is_floating_point() and x.numel() > 0
    }
    if not floats:
        return []
    # A sum reads memory once and is not finite where a value isn't; that of large numbers may overflow.
    device = next(iter(floats.values())).device
    sums = torch.stack([x.sum(dtype=torch.float32).to(device) for x in floats.values()])
    suspects = [name for name, is_finite in zip(floats, sums.isfinite().tolist()) if not is_finite]
    return [name for name in suspects if not floats[name].isfinite().all()]


def check_finite(path: str, weights: Mapping[str, Any]) -> None:
    """
    Raises:
        InputError: weights of the file ``path`` are not finite.
    """
    if faulty := not_finite(weights):
        raise InputError(
            f"{path}: NaN or infinity in {brief(faulty)}: the training that wrote this file had diverged, or the file "
            "is damaged; take an earlier checkpoint, or copy or download it again"
        )


def brief(names: list[str], shown: int = 4) -> str:
    return ", ".join(names[:shown]) + (f", ... ({len(names)} in all)" if len(names) > shown else "")
