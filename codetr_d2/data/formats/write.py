"""An export -> a folder that training reads: COCO json beside the pictures, or links to them."""

import json
import os
import shutil
import tempfile
from collections.abc import Sequence
from pathlib import Path

from ...errors import InputError, named_disk_problems
from .export import Export

__all__ = ["write_coco_folder"]


def write_coco_folder(
    export: Export, splits: Sequence[str], folder: Path, copy: bool = False
) -> dict[str, tuple[Path, Path]]:
    """Write ``train.json``, ``val.json`` and so on beside folders of their pictures.

    The folder is there as a whole or not at all.

    Args:
        export: what to write.
        splits: "train", "val" or "test" for each of its images.
        folder: where to.
        copy: copy the pictures instead of linking to them.

    Returns:
        By split, the folder of pictures and the json file, as absolute paths.

    Raises:
        InputError: the folder is there already, or cannot be written.
    """
    folder = folder.absolute()
    if folder.exists() and (not folder.is_dir() or any(folder.iterdir())):
        raise InputError(f"--output {folder} is there already. Name a new folder, or remove that one.")
    with named_disk_problems(str(folder)):
        folder.parent.mkdir(parents=True, exist_ok=True)
        temporary = Path(tempfile.mkdtemp(prefix=f".{folder.name}-", dir=folder.parent))
        try:
            for split in set(splits):
                _write_split(export, [x == split for x in splits], temporary, split, copy)
            temporary.chmod(0o755)
            os.replace(temporary, folder)
        finally:
            shutil.rmtree(temporary, ignore_errors=True)
    used = [x for x in ("train", "val", "test") if x in splits]
    return {split: (folder / split, folder / f"{split}.json") for split in used}


def _write_split(export: Export, is_chosen: list[bool], folder: Path, split: str, copy: bool) -> None:
    images = [x for x, chosen in zip(export.coco["images"], is_chosen) if chosen]
    ids = {x["id"] for x in images}
    # Pictures of several folders may have the same name: what their folders have in common is left out, no more.
    base = os.path.commonpath([os.path.dirname(x["file_name"]) for x in images])
    entries = []
    for image in images:
        name = os.path.relpath(image["file_name"], base)
        target = folder / split / name
        target.parent.mkdir(parents=True, exist_ok=True)
        if copy or not _link(image["file_name"], target):
            shutil.copyfile(image["file_name"], target)
        entries.append(
            {"id": image["id"], "file_name": Path(name).as_posix(), "width": image["width"], "height": image["height"]}
        )
    data = {
        "images": entries,
        "annotations": [x for x in export.coco["annotations"] if x["image_id"] in ids],
        "categories": export.coco["categories"],
    }
    (folder / f"{split}.json").write_text(json.dumps(data))


def _link(source: str, target: Path) -> bool:
    """Whether a link could be made: not every file system has them."""
    try:
        target.symlink_to(source)
    except OSError:
        return False
    return True
