"""A json file that grows by one entry at a time and is whole after each."""

import contextlib
import json
import os
import textwrap
from pathlib import Path
from types import TracebackType

from ..errors import InputError

__all__ = ["DetectionsFile", "cannot_be_written"]

_END = b"\n]\n"


class DetectionsFile:
    """A json array, written as its entries come, none of which is kept in memory.

    It is written under a name of its own in the same folder. When the ``with`` block ends it takes the place of
    ``path``, also where an error or Ctrl-C ends the block, with the entries so far; where there is none of these, the
    older file stays.

    Args:
        path: the file; its folder is made.

    Attributes:
        number: of the entries so far.

    Raises:
        InputError: the folder or the file cannot be written, at the beginning or where the disk is full later.
    """

    def __init__(self, path: Path):
        self.path = path
        self.number = 0
        self._unfinished = path.with_name(f"{path.name}.{os.getpid()}.unfinished")
        try:
            path.parent.mkdir(parents=True, exist_ok=True)
            self._file = open(self._unfinished, "wb", buffering=0)
            self._write(0, b"[" + _END)
        except OSError as error:
            self._discard()
            raise cannot_be_written(path, error.strerror) from error
        self._end = 1  # bytes of the entries, to which the end of the array is added

    def add(self, entry: dict) -> None:
        """Append an entry."""
        text = ("," if self.number else "") + "\n" + textwrap.indent(json.dumps(entry, indent=1), " ")
        try:
            self._write(self._end, text.encode() + _END)
        except OSError as error:
            raise cannot_be_written(self.path, error.strerror) from error
        self._end += len(text.encode())
        self.number += 1

    def _write(self, place: int, content: bytes) -> None:
        self._file.seek(place)
        while content:
            content = content[self._file.write(content) :]

    def __enter__(self) -> "DetectionsFile":
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._file.truncate(self._end)  # what may be there of an entry that did not fit, or was interrupted
        self._write(self._end, _END)
        self._file.close()
        if self.number or kind is None:
            os.replace(self._unfinished, self.path)
        else:
            self._discard()

    def _discard(self) -> None:
        with contextlib.suppress(OSError):
            self._unfinished.unlink(missing_ok=True)


def cannot_be_written(path: Path, reason: str) -> InputError:
    """The error of a file in the output folder."""
    return InputError(f"{path} cannot be written ({reason}). Name another folder with --output, or make room.")
