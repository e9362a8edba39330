"""LVIS annotation files (Gupta et al., CVPR 2019), read without the ``lvis`` package."""

import os
from collections import defaultdict

import pycocotools.mask as mask_util
from detectron2.data import MetadataCatalog
from detectron2.structures import BoxMode

from ..errors import InputError
from .json_file import read_annotation_json

__all__ = ["load_lvis"]


def load_lvis(name: str) -> list[dict]:
    """Load a dataset that is registered with the ``evaluator_type`` "lvis" as detectron2 dataset dicts.

    detectron2's own loader imports the ``lvis`` package, which does not run with today's numpy.

    Returns:
        One dict for each image, in the order of their ids. The images lie in the two last parts of their ``coco_url``
        (train2017/x.jpg) below the metadata's ``image_root``. Category ids become 0, 1, ... in ascending order, which
        the metadata's ``thing_dataset_id_to_contiguous_id`` tells.

    Raises:
        InputError: naming the file and the key at fault.
    """
    metadata = MetadataCatalog.get(name)
    path = metadata.json_file
    data = read_annotation_json(path, ("images", "categories"))  # those of a test set have no annotations
    try:
        categories = {x["id"]: x["name"] for x in sorted(data["categories"], key=lambda x: x["id"])}
        class_of = {category: i for i, category in enumerate(categories)}
        annotations = defaultdict(list)
        for x in data.get("annotations", []):
            segmentation = x["segmentation"]
            if isinstance(segmentation, dict) and isinstance(segmentation["counts"], list):
                segmentation = mask_util.frPyObjects(segmentation, *segmentation["size"])
            elif isinstance(segmentation, list):
                segmentation = [polygon for polygon in segmentation if len(polygon) % 2 == 0 and len(polygon) >= 6]
            annotations[x["image_id"]].append(
                {
                    "bbox": x["bbox"],
                    "bbox_mode": BoxMode.XYWH_ABS,
                    "category_id": class_of[x["category_id"]],
                    "segmentation": segmentation,
                }
            )
        dicts = [
            {
                "file_name": os.path.join(metadata.image_root, *x["coco_url"].split("/")[-2:]),
                "height": x["height"],
                "width": x["width"],
                "image_id": x["id"],
                "annotations": annotations[x["id"]],
            }
            for x in sorted(data["images"], key=lambda x: x["id"])
        ]
    except (KeyError, TypeError, AttributeError) as error:
        raise InputError(
            f"The annotation file {path} is not in LVIS's format ({type(error).__name__}: {error}). Get it anew, or "
            "describe a dataset in COCO's format with DATASETS.COCO_JSON."
        ) from error
    if metadata.get("thing_classes") is None:
        metadata.thing_classes = list(categories.values())
    if len(metadata.thing_classes) != len(categories):
        raise InputError(
            f"The annotation file {path} has {len(categories)} categories, but the dataset {name!r} is registered with "
            f"{len(metadata.thing_classes)}. Put the file of that dataset there."
        )
    metadata.thing_dataset_id_to_contiguous_id = class_of
    return dicts
