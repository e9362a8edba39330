"""Label Studio's JSON and JSON-MIN: a list of tasks, with places in percent of the picture's sides."""

import json
import math
from pathlib import Path
from urllib.parse import parse_qs, unquote, urlsplit

from .export import Export, ExportBuilder, Source, split_of_folders

__all__ = ["read_label_studio"]


def read_label_studio(source: Source) -> Export:
    """Read the tasks: rectangles (rotated ones as the box around them), ellipses as boxes, polygons.

    Of a task with several annotations the first counts that was not cancelled. Tasks without any are left out: nobody
    has looked at them.
    """
    builder = ExportBuilder("Label Studio")
    for file in source.files:
        tasks = json.loads(file.read_text(encoding="utf-8-sig"))
        for task in tasks:

            def parse(task=task, file=file) -> None:
                if "data" in task:
                    done = [x for x in task.get("annotations") or [] if not x.get("was_cancelled")]
                    if not done:
                        builder.problem("task without annotations", f"task {task.get('id')} of {file}")
                        return
                    results, fields = done[0]["result"], task["data"]
                else:  # JSON-MIN, whose fields have the names that the labelling interface gives them
                    lists = [x for x in task.values() if isinstance(x, list)]
                    regions = [x for values in lists for x in values if isinstance(x, dict) and _type(x)]
                    results, fields = [{**x, "value": x, "type": _type(x)} for x in regions], task
                name = _picture_name(fields)
                picture = source.pictures.find(name, file.parent)
                split = split_of_folders(picture, source.path) if picture else ""
                image = builder.picture(picture, f"{name} of task {task.get('id')} in {file}", split, _size(results))
                if image is not None:
                    for result in results:
                        _add_result(builder, image, result)

            builder.read(file, parse)
    return builder.export()


def _type(value: dict) -> str:
    return next((key for key in value if key.endswith("labels")), "")


def _picture_name(fields: dict) -> str:
    """The path of a task's picture: whatever field names one, by its suffix or as a local file."""
    for value in fields.values():
        if isinstance(value, str):
            parts = urlsplit(value)
            path = unquote(parse_qs(parts.query).get("d", [parts.path])[0])  # /data/local-files/?d=folder/a.png
            if Path(path).suffix:
                return path.lstrip("/")
    raise ValueError("its data name no picture")


def _size(results: list[dict]) -> tuple[int, int] | None:
    for result in results:
        if result.get("original_width") and result.get("original_height"):
            return int(result["original_width"]), int(result["original_height"])
    return None


def _add_result(builder: ExportBuilder, image: dict, result: dict) -> None:
    value, kind = result["value"], result.get("type", "")
    if kind in ("choices", "textarea", "rating", "relation"):  # said of the picture, or of another result
        return
    labels = value.get(kind) or []
    if kind not in ("rectanglelabels", "ellipselabels", "polygonlabels") or not labels:
        builder.problem(
            "shape that is no object", f"{kind or 'region'} {', '.join(labels) or 'without a label'}", image
        )
        return
    across, down = image["width"] / 100, image["height"] / 100
    if kind == "polygonlabels":
        polygon = [x for px, py in value["points"] for x in (px * across, py * down)]
        builder.object(image, labels[0], None, [polygon])
        return
    angle = math.radians(value.get("rotation") or 0)
    cos, sin = math.cos(angle), math.sin(angle)
    if kind == "ellipselabels":
        x, y, rx, ry = value["x"] * across, value["y"] * down, value["radiusX"] * across, value["radiusY"] * down
        w, h = math.hypot(rx * cos, ry * sin), math.hypot(rx * sin, ry * cos)
        builder.object(image, labels[0], (x - w, y - h, 2 * w, 2 * h))
        return
    x, y, w, h = value["x"] * across, value["y"] * down, value["width"] * across, value["height"] * down
    # It is turned around its top left corner.
    xs = [x + a * w * cos - b * h * sin for a in (0, 1) for b in (0, 1)]
    ys = [y + a * w * sin + b * h * cos for a in (0, 1) for b in (0, 1)]
    builder.object(image, labels[0], (min(xs), min(ys), max(xs) - min(xs), max(ys) - min(ys)))
