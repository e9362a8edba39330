"""What the prepare_*.py scripts share: whole folders or none, COCO files."""

import contextlib
import json
import os
import shutil
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path

MARKER = "complete.json"


def is_complete(folder: Path, recipe: str) -> bool:
    """Whether ``folder`` was written whole by the same recipe, and still holds as many files."""
    try:
        marker = json.loads((folder / MARKER).read_text())
    except (OSError, ValueError):
        return False
    return marker == {"recipe": recipe, "files": count_files(folder)}


def count_files(folder: Path) -> int:
    return sum(x.is_file() and x.name != MARKER for x in folder.rglob("*"))


@contextlib.contextmanager
def whole_folder(folder: Path, recipe: str) -> Iterator[Path]:
    """Give a temporary folder to fill, which becomes ``folder`` once all is written: a killed run leaves nothing there.

    An older dataset of this project in its place is replaced; a folder of anything else is left alone.
    """
    if folder.exists() and not (folder / MARKER).is_file() and any(folder.iterdir()):
        sys.exit(f"error: {folder} holds other files. Give another folder with --output, or move them away.")
    folder.parent.mkdir(parents=True, exist_ok=True)
    temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
    try:
        yield temporary
        marker = {"recipe": recipe, "files": count_files(temporary)}
        (temporary / MARKER).write_text(json.dumps(marker) + "\n")
        temporary.chmod(0o755)
        if folder.exists():
            shutil.rmtree(folder)
        os.replace(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def write_coco(file: Path, images: list[dict], annotations: list[dict], categories: list[str]) -> None:
    """Write a COCO annotation file.

    ``annotations`` have ``image_id``, ``category_id`` and ``bbox`` ([x, y, w, h]), and with masks ``segmentation`` and
    ``area``.
    """
    annotations = [
        {"id": i, **x, "area": x.get("area", x["bbox"][2] * x["bbox"][3]), "iscrowd": 0}
        for i, x in enumerate(annotations, 1)
    ]
    data = {
        "info": {"description": "codetr_d2 quick start"},
        "images": images,
        "annotations": annotations,
        "categories": [{"id": i, "name": name} for i, name in enumerate(categories, 1)],
    }
    file.write_bytes(json.dumps(data).encode() + b"\n")
