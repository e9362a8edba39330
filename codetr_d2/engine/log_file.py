"""The log of a run."""

import logging
import os
import sys

from ..errors import InputError, disk_problem, named_disk_problems

__all__ = ["LogFile", "one_line_errors"]


class LogFile(logging.FileHandler):
    """Appends to the log of one process of a run, in detectron2's format.

    Args:
        folder: of the run.
        rank: of the process.

    Raises:
        InputError: from any call that logs, where the disk is full: what else the run would write is lost too.
    """

    def __init__(self, folder: str, rank: int):
        with named_disk_problems(folder):
            os.makedirs(folder, exist_ok=True)
            super().__init__(os.path.join(folder, f"log.txt.rank{rank}" if rank else "log.txt"), encoding="utf-8")
        self.setFormatter(logging.Formatter("[%(asctime)s] %(name)s %(levelname)s: %(message)s", "%m/%d %H:%M:%S"))

    def handleError(self, record: logging.LogRecord) -> None:
        if problem := disk_problem(sys.exc_info()[1]):
            raise InputError(f"{self.baseFilename}: the log cannot be written: {problem}; make room on that disk")
        super().handleError(record)


def one_line_errors(record: logging.LogRecord) -> bool:
    """A filter for detectron2's loop, which logs with a traceback what the command line prints in one line."""
    error = record.exc_info[1] if record.exc_info else None
    return not (isinstance(error, InputError) or disk_problem(error))
