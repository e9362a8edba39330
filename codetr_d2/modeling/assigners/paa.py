"""Probabilistic anchor assignment."""

import numpy as np
import torch
from torch import Tensor

__all__ = ["select_by_mixture"]

# Losses above this, or not finite, count as so much: they are reported where they are summed, and must not stop the fit
# or keep it from converging, which squares them and adds 1e-6.
MAX_LOSS = 1e3


@torch.no_grad()
def select_by_mixture(losses: Tensor, objects: Tensor, levels: Tensor, topk: int = 9) -> Tensor:
    """Which anchors of each object are positive, by a mixture of two Gaussians fitted to their losses.

    The candidates of an object are its ``topk`` anchors of the smallest loss on each level. Of those that belong to the
    component of the small losses, these are positive: in order of their loss, all up to the most likely one. An object
    with a single candidate has no positive. Everything is copied to the CPU at once, where scikit-learn fits in float64
    (in float32 the variance of few large losses can become negative).

    Source: Kim and Lee, "Probabilistic Anchor Assignment with IoU Prediction for Object Detection", section 3.2.

    Args:
        losses: [M] float.
        objects: [M] int64 the object of each anchor, whatever its image.
        levels: [M] int64 the level of each anchor.
        topk: candidates of each object on one level.

    Returns:
        [M] bool, on the device of the losses.
    """
    finite = losses.double().nan_to_num(nan=MAX_LOSS).clamp(0, MAX_LOSS)
    x, of_object, of_level = torch.stack((finite, objects.double(), levels.double())).cpu().numpy()
    is_positive = np.zeros(len(x), dtype=bool)
    order = np.lexsort((x, of_level, of_object))
    for anchors in _runs(order, of_object):
        candidates = np.concatenate([level[:topk] for level in _runs(anchors, of_level)])
        candidates = candidates[x[candidates].argsort(kind="stable")]
        if len(candidates) > 1:
            is_positive[candidates[_small_losses(x[candidates])]] = True
    return torch.from_numpy(is_positive).to(losses.device)


def _runs(order: np.ndarray, values: np.ndarray) -> list[np.ndarray]:
    """Indices, by whose order the values do not fall, split where the value changes."""
    return [run for run in np.split(order, np.flatnonzero(np.diff(values[order])) + 1) if len(run)]


def _small_losses(losses: np.ndarray) -> np.ndarray:
    """Indices of the positives among the [N] rising float64 losses of an object's candidates."""
    from sklearn.mixture import GaussianMixture  # it takes a second, which only training with PAA shall wait

    column = losses[:, None]
    mixture = GaussianMixture(
        n_components=2,
        covariance_type="diag",
        weights_init=np.full(2, 0.5),
        means_init=column[[0, -1]],
        precisions_init=np.ones((2, 1)),
    ).fit(column)
    small = np.flatnonzero(mixture.predict(column) == 0)
    if not len(small):
        return small
    return small[: mixture.score_samples(column[small]).argmax() + 1]
