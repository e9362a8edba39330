"""Data loaders for training and evaluation."""

import random
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data.detection_utils import SizeMismatchError
from detectron2.data.samplers import InferenceSampler, RepeatFactorTrainingSampler
from detectron2.utils import comm
from torch.utils.data import BatchSampler, DataLoader, Dataset

from ..errors import InputError
from .samplers import BatchStream
from .shared import SharedRecords

__all__ = ["TRAIN_SAMPLERS", "build_test_loader", "build_train_loader"]

# Values of DATALOADER.SAMPLER_TRAIN, as in detectron2.
TRAIN_SAMPLERS = ("TrainingSampler", "RepeatFactorTrainingSampler")


@contextmanager
def _kept_rng():
    """Give the global random generators of the CPU back as they were."""
    python_state, numpy_state, torch_state = random.getstate(), np.random.get_state(), torch.get_rng_state()
    try:
        yield
    finally:
        random.setstate(python_state)
        np.random.set_state(numpy_state)
        torch.set_rng_state(torch_state)


class _Samples(Dataset):
    """Mapped samples by (index, seed): what a sample is depends on this pair alone, whichever worker makes it.

    A faulty image is returned as an ``InputError``: torch would add the worker's traceback to an error that is raised.
    """

    def __init__(self, records: Sequence[dict], mapper: Callable[[dict], dict]):
        self.records = SharedRecords.of(records)
        self.mapper = mapper

    def __len__(self) -> int:
        return len(self.records)

    def __getitem__(self, draw: tuple[int, int]):
        return self.__getitems__([draw])[0]

    def __getitems__(self, draws: list[tuple[int, int]]) -> list:
        with _kept_rng():  # once for a batch: it takes as long as decoding a small image
            return [self._sample(index, seed) for index, seed in draws]

    def _sample(self, index: int, seed: int):
        record = self.records[index]
        random.seed(seed)
        np.random.seed(seed)
        torch.default_generator.manual_seed(seed)
        try:
            sample = self.mapper(record)
        except InputError as error:
            return error
        except (OSError, SizeMismatchError) as error:
            return InputError(f"{record.get('file_name')}: this image cannot be used: {error}")
        if sample is None:  # detectron2 would silently take another image
            return InputError(f"{record.get('file_name')}: the dataset mapper returned nothing for this image")
        return sample


class _Loader(DataLoader):
    """Batches as lists of samples; raises the error of a faulty one."""

    def __init__(self, dataset: _Samples, batch_sampler, cfg: CfgNode):
        super().__init__(
            dataset,
            batch_sampler=batch_sampler,
            num_workers=cfg.DATALOADER.NUM_WORKERS,
            collate_fn=list,
            pin_memory=cfg.MODEL.DEVICE.startswith("cuda") and torch.cuda.is_available(),
        )

    def __iter__(self) -> Iterator[list[dict]]:
        for batch in super().__iter__():
            for sample in batch:
                if isinstance(sample, InputError):
                    raise sample
            yield batch


def _aspect_groups(records: Iterable[dict]) -> list[int]:
    groups = []
    for record in records:
        if "width" not in record or "height" not in record:
            raise InputError(
                f"{record.get('file_name')}: its width and height are not in the dataset; "
                "add them, or set DATALOADER.ASPECT_RATIO_GROUPING False"
            )
        groups.append(int(record["width"] > record["height"]))
    return groups


def build_train_loader(cfg: CfgNode, records: Sequence[dict], mapper: Callable[[dict], dict]) -> DataLoader:
    """The endless loader of training batches: one list of samples for each iteration, this process's share of it.

    Args:
        cfg: ``SOLVER.IMS_PER_BATCH`` images over all processes and accumulated micro-batches; ``DATALOADER`` options.
        records: detectron2 dataset dicts; :class:`SharedRecords` are used as they are, so that a mapper may have them
            too.
        mapper: turns a record into a sample of the model. It may draw from Python's, numpy's and torch's global
            generators.

    Returns:
        a loader whose ``batch_sampler`` is a :class:`BatchStream`: set its ``seed`` and ``start_iteration`` before
        iterating.

    Raises:
        InputError: an image has no size; and, while iterating, an image cannot be read.
    """
    repeat_factors = np.ones(len(records))
    if cfg.DATALOADER.SAMPLER_TRAIN == "RepeatFactorTrainingSampler":
        repeat_factors = RepeatFactorTrainingSampler.repeat_factors_from_category_frequency(
            records, cfg.DATALOADER.REPEAT_THRESHOLD, sqrt=cfg.DATALOADER.REPEAT_SQRT
        )
    stream = BatchStream(
        repeat_factors,
        _aspect_groups(records) if cfg.DATALOADER.ASPECT_RATIO_GROUPING else None,
        cfg.SOLVER.IMS_PER_BATCH,
        rank=comm.get_rank(),
        world_size=comm.get_world_size(),
    )
    return _Loader(_Samples(records, mapper), stream, cfg)


def build_test_loader(cfg: CfgNode, records: Sequence[dict], mapper: Callable[[dict], dict]) -> DataLoader:
    """The loader of an evaluation: every image once, one by one, split over the processes.

    Args and errors are those of :func:`build_train_loader`.
    """
    draws = [(index, 0) for index in InferenceSampler(len(records))]
    return _Loader(_Samples(records, mapper), BatchSampler(draws, batch_size=1, drop_last=False), cfg)
