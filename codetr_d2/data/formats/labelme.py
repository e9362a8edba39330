"""LabelMe: a json file for each picture, of rectangles, polygons and circles."""

import json
import math

from .export import Export, ExportBuilder, Source, split_of_folders

__all__ = ["read_labelme"]


def read_labelme(source: Source) -> Export:
    """Read the json files, and pictures without one as pictures without objects.

    Shapes of the same label and ``group_id`` are parts of one object. Points, lines and masks are left out, and
    reported.
    """
    builder = ExportBuilder("LabelMe")
    labelled = set()
    for file in source.files:

        def parse(file=file) -> None:
            data = json.loads(file.read_text(encoding="utf-8-sig"))
            name = str(data["imagePath"])
            picture = source.pictures.find(name, file.parent) or source.pictures.find_stem(file.stem, file.parent)
            labelled.add(picture)
            claimed = (int(data.get("imageWidth") or 0), int(data.get("imageHeight") or 0))
            image = builder.picture(picture, f"{name} of {file}", split_of_folders(file, source.path), claimed)
            if image is None:
                return
            objects: dict[tuple, list] = {}
            for i, shape in enumerate(data["shapes"]):
                polygon = _polygon(shape)
                if polygon is None:
                    builder.problem("shape that is no object", f"{shape.get('shape_type')} {shape['label']}", image)
                    continue
                group = shape.get("group_id")
                key = (shape["label"], i) if group is None else (shape["label"], "group", group)
                objects.setdefault(key, []).append(polygon)
            for (label, *_), parts in objects.items():
                masks = [polygon for polygon, is_mask in parts if is_mask]
                # A rectangle among the parts has no outline to give.
                keeps = masks if len(masks) == len(parts) else None
                points = [polygon for polygon, _ in parts]
                first, last = _corners(points)
                box = (first[0], first[1], last[0] - first[0], last[1] - first[1])
                builder.object(image, label, box, keeps)

        builder.read(file, parse)
    for picture in source.pictures.files:
        if picture not in labelled:
            builder.picture(picture, str(picture), split_of_folders(picture, source.path))
    return builder.export()


def _polygon(shape: dict) -> tuple[list[float], bool] | None:
    """The outline of a shape and whether it is that of the object, not only of its box; None for what is no area."""
    points = [(float(x), float(y)) for x, y in shape["points"]]
    kind = shape.get("shape_type", "polygon")
    if kind == "polygon" and len(points) >= 3:
        return [x for point in points for x in point], True
    if kind == "rectangle" and len(points) >= 2:
        return [x for point in points for x in point], False
    if kind == "circle" and len(points) == 2:
        (x, y), rim = points[0], math.dist(*points)
        return [x - rim, y - rim, x + rim, y + rim], False
    return None


def _corners(polygons: list[list[float]]) -> tuple[tuple[float, float], tuple[float, float]]:
    xs = [x for polygon in polygons for x in polygon[0::2]]
    ys = [y for polygon in polygons for y in polygon[1::2]]
    return (min(xs), min(ys)), (max(xs), max(ys))
