"""What every format is read into, and what the parsers share."""

import re
from collections import defaultdict
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path, PurePosixPath

import numpy as np
from detectron2.structures.masks import polygon_area

from ...errors import InputError
from ..images import check_image_file, image_size

__all__ = [
    "Export",
    "ExportBuilder",
    "PictureFolder",
    "Problem",
    "Source",
    "pictures_in",
    "split_in",
    "split_of_folders",
]

PICTURE_SUFFIXES = {".bmp", ".gif", ".jfif", ".jpe", ".jpeg", ".jpg", ".jp2", ".png", ".tif", ".tiff", ".webp"}
_SPLITS = {"train": "train", "training": "train", "val": "val", "valid": "val", "validation": "val"}
_SPLITS |= {"test": "test", "testing": "test"}
_LABEL_STUDIO_PREFIX = re.compile(r"^[0-9a-f]{8}-")  # of a picture that was uploaded to Label Studio


@dataclass
class Problem:
    """Something of a dataset that looks wrong.

    Attributes:
        kind: what, the same text for all of a kind.
        detail: what exactly, where.
        image_id: of the picture that it is in; None where it is in none that can be shown.
        bbox: ``[x, y, width, height]`` in pixels of what it is about; None for the whole picture.
        other_image_id: of a second picture that it is about.
    """

    kind: str
    detail: str
    image_id: int | None = None
    bbox: list[float] | None = None
    other_image_id: int | None = None


@dataclass
class Export:
    """The export of a labelling tool.

    Attributes:
        format: the name of the format that it was read as.
        coco: a dict as in COCO's json files. Each image has an absolute ``file_name`` and further ``split``: "train",
            "val", "test", or "" where the export does not say. Ids count from 1. Each annotation has a ``bbox`` of four
            finite numbers, which may be outside of the image or without area, and a ``segmentation`` where the export
            has one.
        problems: what could not be read or used.
    """

    format: str
    coco: dict
    problems: list[Problem] = field(default_factory=list)

    def leave_out(self, problems: list["Problem"]) -> None:
        """Remove the pictures that the problems are of, which then are this export's.

        Raises:
            InputError: no picture is left.
        """
        ids = {x.image_id for x in problems}
        self.coco["images"] = [x for x in self.coco["images"] if x["id"] not in ids]
        self.coco["annotations"] = [x for x in self.coco["annotations"] if x["image_id"] not in ids]
        if not self.coco["images"]:
            raise InputError(f"no picture of this {self.format} export can be read; first: {problems[0].detail}")
        self.problems = [replace(x, image_id=None) if x.image_id in ids else x for x in [*self.problems, *problems]]


@dataclass
class Source:
    """What a parser gets: the folder or file that the user named, and the pictures.

    Attributes:
        path: a folder or a file.
        files: the annotation files of the format at hand, sorted.
        pictures: where pictures are looked for.
    """

    path: Path
    files: list[Path]
    pictures: "PictureFolder"


def pictures_in(folder: Path) -> list[Path]:
    """The absolute paths of all pictures in a folder, by their names, without hidden files and folders."""
    files = (x for x in folder.absolute().rglob("*") if x.suffix.lower() in PICTURE_SUFFIXES)
    return sorted(x for x in files if not any(part.startswith(".") for part in x.relative_to(folder.absolute()).parts))


class PictureFolder:
    """Finds pictures by the names that annotation files give them, which may be paths of another machine."""

    def __init__(self, *folders: Path):
        self.files = sorted({x for folder in folders for x in pictures_in(folder)})
        self._by_name: dict[str, list[Path]] = defaultdict(list)
        self._by_stem: dict[str, list[Path]] = defaultdict(list)
        for file in self.files:
            self._by_name[file.name].append(file)
            self._by_stem[file.stem].append(file)

    def find(self, name: str, near: Path) -> Path | None:
        """The picture of a name or path; of several, the one whose path agrees longest with it and with ``near``.

        Args:
            name: as the annotation file has it, with the separators of any system.
            near: the folder of the annotation file.
        """
        wanted = PurePosixPath(name.replace("\\", "/"))
        if (near / wanted).is_file():
            return (near / wanted).absolute()
        found = self._by_name.get(wanted.name)
        found = found or self._by_name.get(_LABEL_STUDIO_PREFIX.sub("", wanted.name))
        return self._best(found, wanted.parts, near) if found else None

    def find_stem(self, stem: str, near: Path) -> Path | None:
        """The picture of a name without its suffix, likewise."""
        found = self._by_stem.get(stem)
        return self._best(found, (), near) if found else None

    def _best(self, found: list[Path], parts: Sequence[str], near: Path) -> Path:
        def agreement(file: Path) -> tuple[int, int]:
            tail = sum(1 for _ in _shared(reversed(file.parts), reversed(parts)))
            return tail, sum(1 for _ in _shared(file.parts, near.absolute().parts))

        return max(found, key=agreement)


def _shared(first: Iterable[str], second: Iterable[str]) -> Iterable[str]:
    for a, b in zip(first, second):
        if a != b:
            return
        yield a


def split_in(text: str) -> str:
    """ "train", "val" or "test" where a word of the text is one of their names, also as in "instances_val2017"."""
    return next((_SPLITS[word] for word in re.split(r"[^a-z]+", text.lower()) if word in _SPLITS), "")


def split_of_folders(file: Path, root: Path) -> str:
    """Likewise of the folders below ``root`` that a file lies in; the innermost counts."""
    folders = file.parent.relative_to(root.absolute()).parts if file.is_relative_to(root.absolute()) else ()
    return next(filter(None, map(split_in, reversed(folders))), "")


class ExportBuilder:
    """Collects pictures and objects of an export, and what is wrong with them.

    Args:
        format: the name of the format.
        class_names: the classes in their order, where the export lists them; others are appended by name.
    """

    def __init__(self, format: str, class_names: Iterable[str] = ()):
        self.format = format
        self.class_names = list(dict.fromkeys(map(str, class_names)))
        self.problems: list[Problem] = []
        self.images: list[dict] = []
        self._annotations: list[dict] = []
        self._seen: dict[Path, dict] = {}

    def problem(self, kind: str, detail: str, image: dict | None = None) -> None:
        self.problems.append(Problem(kind, detail, image["id"] if image else None))

    def picture(
        self, file: Path | None, what: str, split: str = "", claimed: tuple[int, int] | None = None
    ) -> dict | None:
        """Add a picture; None where it cannot be used, which is then a problem.

        Args:
            file: its path; None where it was not found.
            what: its name and that of the annotation file, for the message.
            split: see :class:`Export`.
            claimed: (width, height) in pixels that the export says, or None.
        """
        if file is None:
            self.problem("missing picture", f"{what}: there is no such picture")
            return None
        if file in self._seen:
            return self._seen[file]
        try:
            width, height = claimed if claimed and min(claimed) > 0 else image_size(file)
            check_image_file(file, (width, height))
        except InputError as error:
            self.problem("unreadable picture", str(error))
            return None
        image = {"id": len(self.images) + 1, "file_name": str(file), "width": width, "height": height, "split": split}
        self.images.append(image)
        self._seen[file] = image
        return image

    def object(
        self, image: dict, label: str, box: Sequence[float] | None, polygons: list[list[float]] | None = None, **more
    ) -> None:
        """Add an object.

        Args:
            image: from :meth:`picture`.
            label: the name of its class.
            box: ``[x, y, width, height]`` in pixels; None: that of the polygons.
            polygons: ``[[x, y, x, y, ...], ...]`` in pixels, or another segmentation as COCO has it; None: no mask.
            more: further entries of the annotation.
        """
        if box is None:
            points = np.concatenate([np.asarray(x, dtype=np.float64).reshape(-1, 2) for x in polygons])
            first, last = points.min(axis=0), points.max(axis=0)
            box = [*first, *(last - first)]
        box = [round(float(x), 4) for x in box]  # a ten-thousandth of a pixel; shares of a side are rounded anyway
        if not np.isfinite(box).all():
            self.problem("box of no place", f"{label}: {box}", image)
            return
        annotation = {"image_id": image["id"], "label": str(label), "bbox": box, "iscrowd": 0, **more}
        if polygons:
            annotation["segmentation"] = polygons
        if "area" not in annotation:
            annotation["area"] = _area(polygons, box)
        self._annotations.append(annotation)

    def read(self, file: Path, parse: Callable[[], None]) -> None:
        """Call ``parse``; where the file's content makes it fail, that is a problem and not an error."""
        try:
            parse()
        except (KeyError, ValueError, TypeError, AttributeError, IndexError, OverflowError) as error:
            text = f"no {error}" if isinstance(error, KeyError) else str(error) or type(error).__name__
            self.problem("unreadable annotation file", f"{file}: {text}")

    def export(self) -> Export:
        """What was collected.

        Raises:
            InputError: there is no usable picture.
        """
        if not self.images:
            first = self.problems[0].detail if self.problems else "no pictures were found"
            raise InputError(
                f"no picture of this {self.format} export can be used; first: {first}. Name the folder of the pictures "
                "with --images, or correct the export."
            )
        others = sorted({x["label"] for x in self._annotations} - set(self.class_names))
        names = [*self.class_names, *others]
        ids = {name: i for i, name in enumerate(names, 1)}
        annotations = [
            {"id": i, "category_id": ids[x["label"]], **{key: x[key] for key in x if key != "label"}}
            for i, x in enumerate(self._annotations, 1)
        ]
        categories = [{"id": i, "name": name} for name, i in ids.items()]
        coco = {"images": self.images, "annotations": annotations, "categories": categories}
        return Export(self.format, coco, self.problems)


def _area(polygons: object, box: list[float]) -> float:
    """Square pixels of polygons, or of the box where there are none."""
    if isinstance(polygons, list) and polygons:
        return float(sum(polygon_area(np.asarray(x[0::2]), np.asarray(x[1::2])) for x in polygons))
    return box[2] * box[3]
