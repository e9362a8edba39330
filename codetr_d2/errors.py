"""The one error type for what a user can mend."""

import errno
from collections.abc import Iterator
from contextlib import contextmanager

__all__ = ["InputError", "disk_problem", "named_disk_problems"]


class InputError(ValueError):
    """A file, a key or an option that the user gave is at fault.

    The message names it and says how to mend it. Command lines print it as one line, without a traceback.
    """


_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EROFS, errno.EIO, errno.ESTALE)


def disk_problem(error: BaseException | None) -> str:
    """What a disk that is full or broken had to say, like "No space left on device"; "" where that is not the matter.

    torch's own errors have the system's as what was raised before them.
    """
    while error is not None:
        if isinstance(error, OSError) and error.errno in _DISK:
            return error.strerror
        error = error.__cause__ or error.__context__
    return ""


@contextmanager
def named_disk_problems(place: str) -> Iterator[None]:
    """Raise an :class:`InputError` that names ``place`` where writing there fails for want of a disk."""
    try:
        yield
    except InputError:
        raise
    except Exception as error:
        if not (problem := disk_problem(error)):
            raise
        raise InputError(
            f"{place}: cannot be written: {problem}; make room, or choose a folder on another disk"
        ) from error
