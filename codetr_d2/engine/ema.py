"""Exponential moving average of a model's weights."""

import math
from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn

__all__ = ["ModelEMA"]


class ModelEMA:
    """The moving average of the weights that training changes: trainable parameters and floating-point buffers.

    After step t (from 0) ``average += m_t * (weight - average)`` with
    ``m_t = (1 - m) * exp(-(1 + t) / warmup_iters) + m`` and ``m = 1 - decay``: the first steps replace the average,
    later ones hardly move it. Source: the published training of the ViT models.

    Args:
        model: the model, not wrapped for distribution; its present weights start the average.
        decay: what the average keeps of itself in a late step.
        warmup_iters: time constant of the approach to ``decay``, in steps.
    """

    def __init__(self, model: nn.Module, decay: float, warmup_iters: int):
        self.decay = decay
        self.warmup_iters = warmup_iters
        self.loaded = False
        weights = {
            name: weight
            for name, weight in model.state_dict(keep_vars=True).items()
            if weight.is_floating_point() and (weight.requires_grad or not isinstance(weight, nn.Parameter))
        }
        unique = {id(weight): weight for weight in weights.values()}  # a shared weight has several names
        self._weights = list(unique.values())
        self._averages = [weight.detach().clone() for weight in self._weights]
        index = {key: i for i, key in enumerate(unique)}
        self._index = {name: index[id(weight)] for name, weight in weights.items()}

    def momentum(self, step: int) -> float:
        """m_t of the class's docstring."""
        final = 1 - self.decay
        return (1 - final) * math.exp(-(1 + step) / max(self.warmup_iters, 1e-9)) + final

    @torch.no_grad()
    def update(self, step: int) -> None:
        """Take in the weights after step ``step``, counted from 0."""
        torch._foreach_lerp_(self._averages, [weight.detach() for weight in self._weights], self.momentum(step))

    @torch.no_grad()
    def restart(self) -> None:
        """Start again from the model's present weights."""
        torch._foreach_copy_(self._averages, [weight.detach() for weight in self._weights])

    @contextmanager
    def applied(self) -> Iterator[None]:
        """Within this context the model has the averaged weights. Nothing is copied: the tensors change places."""
        self._swap()
        try:
            yield
        finally:
            self._swap()

    def _swap(self) -> None:
        for weight, average in zip(self._weights, self._averages):
            weight.data, average.data = average.data, weight.data

    def state_dict(self) -> dict[str, Tensor]:
        return {name: self._averages[i] for name, i in self._index.items()}

    @torch.no_grad()
    def load_state_dict(self, state_dict: dict[str, Tensor]) -> None:
        for name, i in self._index.items():
            self._averages[i].copy_(state_dict[name])
        self.loaded = True
