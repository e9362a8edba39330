"""Reading annotation files."""

import contextlib
import gc
import json
from collections.abc import Iterator

from detectron2.utils.file_io import PathManager

from ..errors import InputError

__all__ = ["paused_gc", "read_annotation_json"]

# How files begin that are often taken for JSON by their name.
_OTHER_FORMATS = {
    b"PK\x03\x04": "a zip archive. Unpack it and name the json file inside",
    b"\x1f\x8b": "a gzip archive. Unpack it",
    b"version https://git-lfs": "a pointer of Git LFS, not the file itself. Fetch it with `git lfs pull`",
    b"<": "a page in HTML or XML. Download the file again",
}


@contextlib.contextmanager
def paused_gc() -> Iterator[None]:
    """Without the search for cycles, which millions of new containers without one would make again and again."""
    was_enabled = gc.isenabled()
    gc.disable()
    try:
        yield
    finally:
        if was_enabled:
            gc.enable()


def read_annotation_json(path: str) -> dict:
    """Read a json object with the lists "images" and "categories": of UTF-8 text, with or without a byte-order mark.

    Raises:
        InputError: the file is no such object, or cannot be read.
    """
    try:
        with PathManager.open(path, "rb") as file:
            content = file.read()
    except OSError as error:
        raise InputError(
            f"The annotation file {path} cannot be read ({error.strerror or error}). Check the path."
        ) from error
    for start, kind in _OTHER_FORMATS.items():
        if content[:100].lstrip().startswith(start):
            raise InputError(f"The annotation file {path} is {kind}.")
    try:
        text = content.decode(json.detect_encoding(content))
        del content  # of hundreds of megabytes, where the text is another such
        with paused_gc():
            data = json.loads(text)
    except UnicodeDecodeError as error:
        raise InputError(
            f"The annotation file {path} is not text in UTF-8 ({error.reason} at byte {error.start}). Save it as UTF-8."
        ) from error
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"The annotation file {path} is not readable JSON ({error}). Write it anew in COCO's format."
        ) from error
    if not isinstance(data, dict):
        raise InputError(f"The annotation file {path} holds a {type(data).__name__}, not a COCO object.")
    for key in ("images", "categories"):
        if not isinstance(data.get(key), list):
            raise InputError(
                f'The annotation file {path} has no list "{key}". Its format needs images, annotations and categories.'
            )
    return data
