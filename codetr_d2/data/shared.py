"""Work on data that one process of each machine does for all of its processes."""

import os
import pickle
import shutil
import tempfile
from collections.abc import Callable, Iterable, Sequence

import numpy as np
from detectron2.utils import comm

from ..errors import InputError

__all__ = ["SharedRecords", "once_on_each_machine"]

_SHARED_MEMORY = "/dev/shm"  # a folder in memory, where the system has it


class SharedRecords(Sequence):
    """Dataset dicts as bytes in one array, which processes can share without each coming to hold a copy.

    Each access gives a new dict.

    Args:
        records: the dataset dicts.
    """

    def __init__(self, records: Iterable[dict]):
        pickled = [pickle.dumps(record, pickle.HIGHEST_PROTOCOL) for record in records]
        self._ends = np.cumsum([len(x) for x in pickled], dtype=np.int64)
        self._bytes = np.frombuffer(b"".join(pickled), np.uint8)

    @classmethod
    def of(cls, records: Sequence[dict]) -> "SharedRecords":
        """The records in this form, which they may have already."""
        return records if isinstance(records, cls) else cls(records)

    def __len__(self) -> int:
        return len(self._ends)

    def __getitem__(self, index: int) -> dict:
        if not -len(self) <= index < len(self):
            raise IndexError(index)
        index %= len(self)
        start = self._ends[index - 1] if index else 0
        return pickle.loads(memoryview(self._bytes[start : self._ends[index]]))

    def save(self, folder: str) -> None:
        np.save(os.path.join(folder, "ends.npy"), self._ends)
        np.save(os.path.join(folder, "bytes.npy"), self._bytes)

    @classmethod
    def open(cls, folder: str) -> "SharedRecords":
        """Those that another process has saved. The files may be deleted after that."""
        records = cls.__new__(cls)
        records._ends = np.load(os.path.join(folder, "ends.npy"))
        mode = "r" if len(records) else None  # a file without content cannot be mapped
        records._bytes = np.load(os.path.join(folder, "bytes.npy"), mmap_mode=mode)
        return records


def once_on_each_machine(load: Callable[[], tuple[list[dict], dict]]) -> tuple[Sequence[dict], dict]:
    """Let the first process of each machine call ``load``, and give its result to all processes of the machine.

    All processes must call this together.

    Args:
        load: returns dataset dicts, and something small beside them.

    Raises:
        InputError: in every process, where ``load`` raised it in one.
    """
    if comm.get_world_size() == 1:
        return load()
    folder, message, records, extra = "", "", None, {}
    if comm.get_local_rank() == 0:
        # Only this user can write there, so that the others may unpickle what they find.
        folder = tempfile.mkdtemp(prefix="codetr_d2_", dir=_SHARED_MEMORY if os.path.isdir(_SHARED_MEMORY) else None)
    try:
        if folder:
            try:
                records, extra = load()
                SharedRecords(records).save(folder)
                del records
            except InputError as error:
                message = str(error)
        results = comm.all_gather((comm.get_rank() - comm.get_local_rank(), folder, message, extra))
        for _, _, message, _ in results:
            if message:
                raise InputError(message)
        own = comm.get_rank() - comm.get_local_rank()
        [(folder_of_machine, extra)] = [(f, e) for first, f, _, e in results if first == own and f]
        records = SharedRecords.open(folder_of_machine)
        comm.synchronize()  # before the folder goes
        return records, extra
    finally:
        if folder:
            shutil.rmtree(folder, ignore_errors=True)
