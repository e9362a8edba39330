"""Which images each training step sees: a stream that depends on the seed and on the position in it alone."""

import itertools
import random
from collections import defaultdict
from collections.abc import Iterator, Sequence

import numpy as np
import torch
from torch.utils.data import Sampler

__all__ = ["BatchStream", "derive_seed", "seed_rng"]


def derive_seed(*parts) -> int:
    """A 32-bit seed for one use of randomness.

    Args:
        parts: non-negative integers and names, for instance ``(run_seed, "step", iteration, rank)``. Any difference in
            them gives an unrelated seed.
    """
    numbers = [int.from_bytes(part.encode(), "little") if isinstance(part, str) else part for part in parts]
    return int(np.random.SeedSequence(numbers).generate_state(1)[0])


def seed_rng(seed: int) -> None:
    """Seed every global random generator: Python's, numpy's and torch's, on the CPU and on the GPUs."""
    random.seed(seed)
    np.random.seed(seed)
    torch.default_generator.manual_seed(seed)
    if torch.cuda.is_available():  # torch.manual_seed would note where it was called from, for a GPU that is not there
        torch.cuda.manual_seed_all(seed)


class BatchStream(Sampler[list[tuple[int, int]]]):
    """The infinite stream of training batches, as a ``batch_sampler``: lists of (image's index, sample's seed).

    An epoch is a random permutation of the images. Images of one aspect group make a batch; what does not fill a batch
    waits for later images. Batches are formed for all processes together and only then split, so that the number of
    processes does not change which images a step sees. All this is work on integers, so that a resumed run skips the
    batches of the steps that it has already done in no time.

    Attributes:
        seed: seed of the run. It may be set until iteration begins.
        start_iteration: the first batch to produce. It may be set until iteration begins.

    Args:
        repeat_factors: for each image how often, on average, it comes in an epoch. A fraction is rounded up or down at
            random in every epoch (LVIS paper, appendix B.2).
        groups: the aspect group of each image, or None for a single group.
        total_batch_size: images of a step, over all processes.
        seed, start_iteration: see above.
        rank, world_size: which share of each batch is produced: the ``rank``-th of ``world_size`` equal parts.
    """

    def __init__(
        self,
        repeat_factors: Sequence[float],
        groups: Sequence[int] | None,
        total_batch_size: int,
        seed: int = 0,
        start_iteration: int = 0,
        rank: int = 0,
        world_size: int = 1,
    ):
        self.repeat_factors = torch.as_tensor(repeat_factors, dtype=torch.float64)
        if len(self.repeat_factors) == 0 or self.repeat_factors.sum() < 1 or total_batch_size % world_size:
            raise ValueError("a stream needs images, and a batch that its processes can share equally")
        self.groups = [0] * len(self.repeat_factors) if groups is None else list(groups)
        self.total_batch_size = total_batch_size
        self.seed = seed
        self.start_iteration = start_iteration
        share = total_batch_size // world_size
        self._share = slice(rank * share, (rank + 1) * share)

    @property
    def epoch_size(self) -> float:
        """Images of an epoch, on average."""
        return float(self.repeat_factors.sum())

    def _epoch(self, epoch: int) -> list[int]:
        generator = torch.Generator().manual_seed(derive_seed(self.seed, "epoch", epoch))
        whole = self.repeat_factors.floor()
        chance = torch.rand(len(whole), dtype=torch.float64, generator=generator)
        repeats = (whole + (chance < self.repeat_factors - whole)).long()
        indices = torch.repeat_interleave(torch.arange(len(whole)), repeats)
        return indices[torch.randperm(len(indices), generator=generator)].tolist()

    def __iter__(self) -> Iterator[list[tuple[int, int]]]:
        draws = itertools.chain.from_iterable(self._epoch(epoch) for epoch in itertools.count())
        waiting = defaultdict(list)
        iteration = 0
        for position, index in enumerate(draws):
            batch = waiting[self.groups[index]]
            batch.append((index, position))
            if len(batch) < self.total_batch_size:
                continue
            del waiting[self.groups[index]]
            if iteration >= self.start_iteration:
                yield [(i, derive_seed(self.seed, "sample", p)) for i, p in batch[self._share]]
            iteration += 1
