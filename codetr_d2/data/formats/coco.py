"""COCO's json, as of Roboflow, CVAT, Label Studio and many more: one file, or one for each split."""

import math
import re
from pathlib import Path

from ..json_file import read_annotation_json
from .export import Export, ExportBuilder, Source, split_in, split_of_folders

__all__ = ["read_coco"]


def read_coco(source: Source) -> Export:
    """Read the annotation files; a split is known by its file or folder, such as ``instances_val2017.json``.

    Categories of the same name in several files are one. A category that is nothing but the supercategory of others and
    has no annotations, as Roboflow writes it, is left out.
    """
    contents = {file: read_annotation_json(str(file)) for file in _of_objects(source.files)}
    categories = [category for data in contents.values() for category in data["categories"]]
    used = {x.get("category_id") for data in contents.values() for x in data.get("annotations") or []}
    parents = {x.get("supercategory") for x in categories} - {"none"}
    roots = {x["name"] for x in categories if x["name"] in parents and x["id"] not in used}
    builder = ExportBuilder("COCO", [x["name"] for x in categories if x["name"] not in roots])
    for file, data in contents.items():
        split = split_in(file.stem) or split_of_folders(file, source.path)
        names = {x["id"]: x["name"] for x in data["categories"]}
        images = {}
        for entry in data["images"]:
            picture = source.pictures.find(str(entry["file_name"]), file.parent)
            claimed = (entry["width"], entry["height"]) if entry.get("width") and entry.get("height") else None
            images[entry["id"]] = builder.picture(picture, f"{entry['file_name']} in {file}", split, claimed)
        for entry in data.get("annotations") or []:

            def parse(entry=entry, file=file, images=images, names=names) -> None:
                if entry["image_id"] not in images or entry["category_id"] not in names:
                    builder.problem("annotation of no picture or class", f"{file}: annotation {entry.get('id')}")
                elif (image := images[entry["image_id"]]) is not None:
                    segmentation = entry.get("segmentation") or None
                    x, y, width, height = map(float, entry["bbox"])
                    area = float(entry.get("area") or 0)
                    more = {"area": area} if 0 < area < math.inf else {}
                    if entry.get("iscrowd"):
                        more["iscrowd"] = 1
                    builder.object(image, names[entry["category_id"]], (x, y, width, height), segmentation, **more)

            builder.read(file, parse)
    return builder.export()


def _of_objects(files: list[Path]) -> list[Path]:
    """The files of objects, where a folder has others of the same pictures too, as that of COCO itself."""
    instances = [x for x in files if x.stem.startswith("instances")]
    others = [x for x in files if not re.search("captions|keypoints|panoptic|stuff|image_info", x.stem)]
    return instances or others or files
