"""Reading annotation files."""

import json
from collections.abc import Sequence

from detectron2.utils.file_io import PathManager

from ..errors import InputError

__all__ = ["read_annotation_json"]


def read_annotation_json(path: str, lists: Sequence[str] = ("images", "annotations", "categories")) -> dict:
    """Read a json object that has ``lists``.

    Raises:
        InputError: the file is no such object, or cannot be read.
    """
    try:
        with PathManager.open(path) as file:
            data = json.load(file)
    except (OSError, ValueError) as error:  # ValueError: not JSON, or not text
        raise InputError(
            f"The annotation file {path} is not readable JSON ({error}). Write it anew in COCO's format."
        ) from error
    if not isinstance(data, dict):
        raise InputError(f"The annotation file {path} holds a {type(data).__name__}, not a COCO object.")
    for key in lists:
        if not isinstance(data.get(key), list):
            raise InputError(
                f'The annotation file {path} has no list "{key}". '
                f"Its format needs {', '.join(lists[:-1])} and {lists[-1]}."
            )
    return data
