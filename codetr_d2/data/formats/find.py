"""Which format an export has."""

import json
import zipfile
from collections.abc import Callable
from pathlib import Path
from xml.etree import ElementTree

from ...errors import InputError
from .coco import read_coco
from .csv_boxes import CSV_COLUMNS, is_csv_of_boxes, read_csv
from .cvat import read_cvat
from .export import Export, PictureFolder, Source
from .label_studio import read_label_studio
from .labelme import read_labelme
from .pascal_voc import read_pascal_voc
from .yolo import read_yolo, read_yolo_yaml

__all__ = ["FORMATS", "read_export"]

# By the name on the command line; where a folder holds several, the first counts.
FORMATS: dict[str, Callable[[Source], Export]] = {
    "yolo": read_yolo,
    "coco": read_coco,
    "label_studio": read_label_studio,
    "labelme": read_labelme,
    "cvat": read_cvat,
    "voc": read_pascal_voc,
    "csv": read_csv,
}


def read_export(path: Path, images: Path | None = None, format: str = "") -> Export:
    """Read what a labelling tool has exported.

    Args:
        path: its unpacked folder, or its annotation file.
        images: a folder with the pictures, where they are not in that of the export.
        format: a name in :data:`FORMATS`; "": whatever is found.

    Raises:
        InputError: nothing of a known format is there, a file of all pictures' annotations is malformed, or none of the
            pictures can be used.
    """
    if not path.exists():
        raise InputError(f"{path} does not exist. Name the folder or the annotation file of an export.")
    if images is not None and not images.is_dir():
        raise InputError(f"--images {images}: there is no such folder")
    if path.is_file() and zipfile.is_zipfile(path):
        raise InputError(f"{path} is a zip archive. Unpack it and name the folder.")
    path = path.absolute()
    root = path if path.is_dir() else path.parent
    found = _find_files(path, format)
    names = [name for name in FORMATS if found.get(name) and format in ("", name)]
    if not names:
        what = f"nothing of the format {format}" if format else "no annotations of a known format"
        raise InputError(
            f"{path} holds {what}. These are read: COCO json, YOLO with data.yaml or classes.txt, Pascal VOC, LabelMe, "
            f"CVAT for images 1.1, Label Studio JSON, CSV with the columns {CSV_COLUMNS}. Of Roboflow and others choose"
            " one of these when exporting."
        )
    files = found[names[0]]
    try:
        return FORMATS[names[0]](Source(root, files, PictureFolder(*([images] if images else [root]))))
    except InputError:
        raise
    except (KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError, OSError) as error:
        text = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
        raise InputError(
            f"{files[0]} is not what a file of the format {names[0]} should be ({text}). Export it again, or name "
            "another format with --format."
        ) from error


def _find_files(path: Path, format: str) -> dict[str, list[Path]]:
    """The annotation files of each format."""
    found: dict[str, list[Path]] = {}
    files = [path] if path.is_file() else sorted(x for x in path.rglob("*") if x.is_file())
    files = [x for x in files if not any(part.startswith(".") for part in x.relative_to(path.parent).parts)]
    for file in sorted(files, key=lambda x: (len(x.parts), x)):
        suffix = file.suffix.lower()
        if file.name in ("classes.txt", "obj.names"):
            name = "yolo"
        elif suffix in (".yaml", ".yml"):
            name = "yolo" if read_yolo_yaml(file) else ""
        elif suffix == ".json":
            name = _format_of_json(file)
        elif suffix == ".xml":
            name = _format_of_xml(file)
        else:
            name = "csv" if suffix == ".csv" and is_csv_of_boxes(file) else ""
        if name:
            found.setdefault(name, []).append(file)
    return found


def _format_of_json(file: Path) -> str:
    try:
        data = json.loads(file.read_bytes())
    except (ValueError, OSError):
        # A broken file of the one picture must not hide the others; a broken file of all is named by its reader.
        return "labelme" if file.with_suffix("").name and _has_picture(file) else "coco"
    if isinstance(data, dict):
        if {"images", "annotations", "categories"} <= data.keys():
            return "coco"
        return "labelme" if {"shapes", "imagePath"} <= data.keys() else ""
    first = data[0] if isinstance(data, list) and data and isinstance(data[0], dict) else {}
    return "label_studio" if "id" in first and ("annotations" in first or "annotator" in first) else ""


def _has_picture(file: Path) -> bool:
    return any(x.suffix.lower() != ".json" for x in file.parent.glob(f"{file.stem}.*"))


def _format_of_xml(file: Path) -> str:
    try:
        for _, element in ElementTree.iterparse(file, events=("start",)):
            return {"annotations": "cvat", "annotation": "voc"}.get(element.tag, "")
    except ElementTree.ParseError:
        pass
    return "voc" if _has_picture(file) else ""
