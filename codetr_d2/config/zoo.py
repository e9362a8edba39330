"""Where the configs of the model zoo lie, and which file a name of the command line means."""

import difflib
import os
from pathlib import Path

from ..errors import InputError

__all__ = ["find_config_file", "zoo_folder", "zoo_neighbours"]

# In an installed package the configs lie there (setup.py copies them), in a checkout at its top.
_FOLDERS = (Path(__file__).parents[1] / "model_zoo" / "configs", Path(__file__).parents[2] / "configs")


def zoo_folder() -> Path:
    """The folder of the model zoo's configs."""
    return next((x for x in _FOLDERS if x.is_dir()), _FOLDERS[0])


def zoo_neighbours(name: str) -> str:
    """Names of the model zoo that are near to one that is none, as the end of a message."""
    folder = zoo_folder()
    known = sorted(x.relative_to(folder).as_posix() for x in folder.glob("[!_]*/*.yaml"))
    near = difflib.get_close_matches(name, known, n=3, cutoff=0.3)
    return f"Near to it: {', '.join(near)}" if near else "MODEL_ZOO.md lists those that there are"


def find_config_file(name: str, folder: str = "") -> str:
    """The file that a name means: a file on disk, or else one of the model zoo.

    Args:
        name: a path, an address, or a name of the model zoo like "co_dino/co_dino_5scale_r50_1x_coco.yaml". ``~`` at
            its start is the home folder.
        folder: what a relative path is relative to; "" for the working folder.

    Raises:
        InputError: it is neither.
    """
    path = os.path.join(folder, os.path.expanduser(name))
    if "://" in path or os.path.exists(path):
        return path
    if os.path.isabs(os.path.expanduser(name)):
        raise InputError(f"{path}: cannot read this config file: it does not exist")
    in_zoo = zoo_folder() / name
    if in_zoo.is_file():
        return str(in_zoo)
    raise InputError(
        f"{name}: cannot read this config file: there is none in {os.path.abspath(folder or '.')}, and no such config "
        f"in the model zoo ({zoo_folder()}). {zoo_neighbours(name)}"
    )
