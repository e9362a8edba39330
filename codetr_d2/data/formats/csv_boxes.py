"""CSV, a box a line: DeepForest, keras-retinanet, Roboflow's and TensorFlow's "Object Detection CSV"."""

import csv
from collections.abc import Iterator
from pathlib import Path

from ...errors import InputError
from .export import PICTURE_SUFFIXES, Export, ExportBuilder, Source, split_in, split_of_folders

__all__ = ["CSV_COLUMNS", "is_csv_of_boxes", "read_csv"]

CSV_COLUMNS = "image_path (or filename), xmin, ymin, xmax, ymax, label (or class)"
_EDGES = ("xmin", "ymin", "xmax", "ymax")
# The names in a header, in small letters -> what the column is.
_HEADER = {"image_path": "picture", "filename": "picture", "label": "class", "class": "class"}
_HEADER |= {x: x for x in (*_EDGES, "width", "height")}
_WITHOUT_HEADER = dict(enumerate(("picture", *_EDGES, "class")))


def is_csv_of_boxes(file: Path) -> bool:
    """Whether the first line names an edge of a box, or is a picture, its four edges or none, and a class."""
    try:
        first = next(_lines(file, errors="replace"), (0, []))[1]
    except (OSError, InputError):
        return False
    return _is_header(first) or _is_box(first)


def read_csv(source: Source) -> Export:
    """Read the files; a split is known by the name of a file or of its folder, such as ``train.csv``.

    Edges are pixels from the left upper corner of the picture. A line without edges, or with four zeros, is of a
    picture without objects; pictures that no line names are left out. The classes are all names that occur.

    Raises:
        InputError: a column is missing, or the boxes are in shares of the pictures' sides.
    """
    builder = ExportBuilder("CSV")
    for file in source.files:
        split = split_in(file.stem) or split_of_folders(file, source.path)
        images: dict[str, dict | None] = {}
        columns = _WITHOUT_HEADER
        for number, (line, cells) in enumerate(_lines(file)):
            if number == 0 and _is_header(cells):
                columns = _columns(file, line, cells)
                continue
            place = f"{file}:{line}"

            def parse(cells=cells, columns=columns, place=place, near=file.parent, split=split, images=images) -> None:
                if len(cells) <= max(columns):
                    raise ValueError(f"{len(cells)} cells are too few")
                row = {what: cells[i].strip() for i, what in columns.items()}
                name = row["picture"]
                if name not in images:  # of a picture that can't be used, the first line is reported
                    width, height = (round(float(row.get(x) or 0)) for x in ("width", "height"))
                    picture = source.pictures.find(name, near)
                    images[name] = builder.picture(picture, f"{name} in {place}", split, (width, height))
                if images[name] is None or not any(row[x] for x in _EDGES):
                    return
                x0, y0, x1, y1 = (float(row[x]) for x in _EDGES)
                if any((x0, y0, x1, y1)):
                    if not row["class"]:
                        raise ValueError("the class is empty")
                    builder.object(images[name], row["class"], (x0, y0, x1 - x0, y1 - y0))

            builder.read(Path(place), parse)
    export = builder.export()
    boxes = [x["bbox"] for x in export.coco["annotations"]]
    if boxes and all(x + width <= 1 and y + height <= 1 for x, y, width, height in boxes):
        raise InputError(
            f"{source.files[0]}: no box goes beyond the first pixel, as if they were shares of the pictures' sides. "
            "Write them in pixels."
        )
    return export


def _lines(file: Path, errors: str = "strict") -> Iterator[tuple[int, list[str]]]:
    """The number and the cells of each line that is not empty."""
    with file.open(encoding="utf-8-sig", errors=errors, newline="") as text:
        first = text.readline()
        text.seek(0)
        # Spreadsheets write semicolons where the comma is that of the numbers.
        reader = csv.reader(text, delimiter=max(",;\t", key=first.count))
        try:
            for cells in reader:
                if any(x.strip() for x in cells):
                    yield reader.line_num, cells
        except csv.Error as error:
            raise InputError(f"{file}:{reader.line_num} is not readable CSV ({error}). Export it again.") from error


def _is_header(cells: list[str]) -> bool:
    return any(x.strip().lower() in _EDGES for x in cells)


def _is_box(cells: list[str]) -> bool:
    if len(cells) != 6 or Path(cells[0].strip()).suffix.lower() not in PICTURE_SUFFIXES:
        return False
    if not any(x.strip() for x in cells[1:5]):
        return True
    try:
        x0, y0, x1, y1 = map(float, cells[1:5])
    except ValueError:
        return False
    return x0 <= x1 and y0 <= y1  # otherwise they may be corner and size


def _columns(file: Path, line: int, header: list[str]) -> dict[int, str]:
    """By the place of a column, what it is; of several that are the same, the first."""
    found: dict[str, int] = {}
    for i, name in enumerate(header):
        if what := _HEADER.get(name.strip().lower()):
            found.setdefault(what, i)
    if missing := [what for what in ("picture", *_EDGES, "class") if what not in found]:
        raise InputError(
            f"{file}:{line} has no column of the {', '.join(missing)}. These are looked for, in any order: "
            f"{CSV_COLUMNS}."
        )
    return {i: what for what, i in found.items()}
