"""YOLO's text files, boxes or polygons, with data.yaml or a list of classes."""

from pathlib import Path

import yaml

from ...errors import InputError
from .export import Export, ExportBuilder, PictureFolder, Source, pictures_in, split_of_folders

__all__ = ["read_yolo", "read_yolo_yaml"]

_SPLIT_KEYS = {"train": "train", "val": "val", "valid": "val", "test": "test"}


def read_yolo_yaml(file: Path) -> dict | None:
    """A data.yaml; None where the file is something else."""
    try:
        data = yaml.safe_load(file.read_text(encoding="utf-8-sig"))
    except (OSError, UnicodeDecodeError, yaml.YAMLError):
        return None
    return data if isinstance(data, dict) and isinstance(data.get("names"), (list, dict)) else None


def read_yolo(source: Source) -> Export:
    """Read a folder; ``source.files`` has its data.yaml (Ultralytics, Roboflow, CVAT), classes.txt (Label Studio) or
    obj.names (Darknet, CVAT).

    The label file of ``images/x/a.jpg`` is ``labels/x/a.txt``, or lies beside the picture. A picture without one has no
    objects. Lines of five or six numbers are boxes (the sixth is a score), longer ones polygons, or with ``kpt_shape``
    in the data.yaml boxes with key points.
    """
    file = source.files[0]
    if file.suffix in (".txt", ".names"):
        names = dict(enumerate(x.strip() for x in file.read_text(encoding="utf-8-sig").splitlines() if x.strip()))
        splits, num_keypoints = {}, 0
    else:
        data = read_yolo_yaml(file)
        names = data["names"]
        names = {int(i): str(x) for i, x in (names.items() if isinstance(names, dict) else enumerate(names))}
        splits = {_SPLIT_KEYS[key]: data[key] for key in _SPLIT_KEYS if data.get(key)}
        shape = data.get("kpt_shape")
        num_keypoints = shape[0] * shape[1] if shape else 0
        root = (file.parent / str(data["path"])) if data.get("path") else file.parent
    builder = ExportBuilder("YOLO", [names[i] for i in sorted(names)])
    if splits:
        pictures = [
            (picture, split)
            for split, places in splits.items()
            for place in (places if isinstance(places, list) else [places])
            for picture in _pictures_at(str(place), root, file, source.pictures)
        ]
        if not pictures:
            raise InputError(
                f"{file}: its {', '.join(splits)} name no folder with pictures. Correct them, or its `path`; they are "
                "looked for from the folder of this file too."
            )
    else:
        pictures = [(x, split_of_folders(x, source.path)) for x in source.pictures.files]
    for picture, split in pictures:
        image = builder.picture(picture, str(picture), split)
        labels = _label_file(picture)
        if image is None or labels is None:
            continue
        lines = labels.read_text(encoding="utf-8-sig", errors="replace").splitlines()
        for number, line in enumerate(lines, 1):

            def parse(line=line, image=image) -> None:
                _add_line(builder, image, names, line.split(), num_keypoints)

            if line.strip():
                builder.read(Path(f"{labels}:{number}"), parse)
    return builder.export()


def _pictures_at(place: str, root: Path, file: Path, pictures: PictureFolder) -> list[Path]:
    """The pictures that an entry of data.yaml names: of a folder, or of a text file that lists them.

    Roboflow writes ``../train/images`` for what is ``train/images`` beside the data.yaml.
    """
    inside = place.removeprefix("../")
    for candidate in (root / place, file.parent / place, file.parent / inside):
        if candidate.is_dir():
            return pictures_in(candidate)
        if candidate.is_file() and candidate.suffix == ".txt":
            listed = [x.strip() for x in candidate.read_text(encoding="utf-8-sig").splitlines() if x.strip()]
            return [pictures.find(x, root) or (root / x).absolute() for x in listed]
    return []


def _label_file(picture: Path) -> Path | None:
    parts = picture.parts
    candidates = [picture.with_suffix(".txt")]
    places = [i for i, part in enumerate(parts[:-1]) if part == "images"]
    if places:  # the last one, as Ultralytics has it
        parts = (*parts[: places[-1]], "labels", *parts[places[-1] + 1 :])
        candidates.insert(0, Path(*parts).with_suffix(".txt"))
    return next((x for x in candidates if x.is_file()), None)


def _add_line(builder: ExportBuilder, image: dict, names: dict, values: list[str], num_keypoints: int) -> None:
    index = float(values[0])
    if index not in names:
        raise ValueError(f"class {values[0]} is not among the {len(names)} names")
    label, numbers = names[int(index)], [float(x) for x in values[1:]]
    width, height = image["width"], image["height"]
    if num_keypoints and len(numbers) == 4 + num_keypoints:
        numbers = numbers[:4]
    if len(numbers) in (4, 5):
        x, y, w, h = numbers[:4]
        builder.object(image, label, ((x - w / 2) * width, (y - h / 2) * height, w * width, h * height))
    elif len(numbers) >= 6 and len(numbers) % 2 == 0:
        polygon = [round(x * (height if i % 2 else width), 4) for i, x in enumerate(numbers)]
        builder.object(image, label, None, [polygon])
    else:
        raise ValueError(f"{len(numbers)} numbers are neither a box nor a polygon")
