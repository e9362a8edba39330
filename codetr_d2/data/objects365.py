"""Objects365 v2, registered as ``objects365_v2_train`` and ``objects365_v2_val`` beside detectron2's own datasets.

Expected in ``$DETECTRON2_DATASETS`` (./datasets otherwise)::

    objects365/annotations/zhiyuan_objv2_train.json, zhiyuan_objv2_val.json
    objects365/train/patch8/objects365_v1_00420917.jpg, ...
    objects365/val/patch16/objects365_v2_00908726.jpg, ...
"""

import os

from detectron2.data import DatasetCatalog, MetadataCatalog

from .datasets import AnnotationFile

__all__ = ["register_objects365"]


def register_objects365(root: str) -> None:
    """Register the dataset below ``root``. Nothing is read before it is used."""
    for split in ("train", "val"):
        name = f"objects365_v2_{split}"
        annotation_json = os.path.join(root, "objects365", "annotations", f"zhiyuan_objv2_{split}.json")
        image_folder = os.path.join(root, "objects365", split)
        if name not in DatasetCatalog:  # another project may have registered it
            DatasetCatalog.register(name, AnnotationFile(name, annotation_json, image_folder, "objects365"))
            MetadataCatalog.get(name).set(json_file=annotation_json, image_root=image_folder, evaluator_type="coco")


register_objects365(os.path.expanduser(os.getenv("DETECTRON2_DATASETS", "datasets")))
