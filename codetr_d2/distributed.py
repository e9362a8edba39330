"""Small helpers for training with several processes."""

import torch.distributed as dist
from detectron2.utils import comm
from torch import Tensor

__all__ = ["reduce_mean"]


def reduce_mean(x: Tensor, min_sum: float | None = None) -> Tensor:
    """The mean of ``x`` over all processes; ``x`` itself where there is only one.

    A loss that is divided by such a mean instead of by the process's own count, and whose gradients are averaged over
    the processes (as ``DistributedDataParallel`` does), is the loss of one process with the whole batch.

    Args:
        x: floating-point tensor of the same shape in every process, on a device that the process group serves. All
            processes must call this together.
        min_sum: the sum over all processes counts as at least so much: as where one process divides by at least that.

    Returns:
        A tensor like ``x``; without a gradient where there are several processes.
    """
    world_size = comm.get_world_size()
    total = x
    if world_size > 1:
        total = x.detach().clone()
        dist.all_reduce(total)
    if min_sum is not None:
        total = total.clamp(min=min_sum)
    return total / world_size if world_size > 1 else total
