import json

import numpy as np
import pytest
from detectron2.config import get_cfg
from PIL import Image

from codetr_d2 import add_codetr_config


@pytest.fixture
def make_coco(tmp_path):
    """Write a COCO dataset with ``change`` made to its json object; return (image folder, annotation json) as texts.

    Two images: a.png, 40 x 30 pixels, with boxes of categories 7 (fish) and 3 (bird), and b.png, 20 x 20, with no box.
    """

    def make(change=None, folder="coco"):
        root = tmp_path / folder
        (root / "images").mkdir(parents=True)
        images = [
            {"id": 11, "file_name": "a.png", "width": 40, "height": 30},
            {"id": 5, "file_name": "b.png", "width": 20, "height": 20},
        ]
        for image in images:
            pixels = np.full((image["height"], image["width"], 3), image["id"], np.uint8)
            Image.fromarray(pixels).save(root / "images" / image["file_name"])
        boxes = [(7, [4, 5, 10, 12]), (3, [20, 1, 15, 20])]
        data = {
            "info": {},
            "images": images,
            "annotations": [
                {"id": i, "image_id": 11, "category_id": c, "bbox": b, "area": b[2] * b[3], "iscrowd": 0}
                for i, (c, b) in enumerate(boxes, 1)
            ],
            "categories": [{"id": 7, "name": "fish"}, {"id": 3, "name": "bird"}],
        }
        if change is not None:
            change(data)
        (root / "annotations.json").write_text(json.dumps(data))
        return str(root / "images"), str(root / "annotations.json")

    return make


@pytest.fixture
def make_cfg(request):
    """A config with datasets called train and test, whose names are unique to the running test."""

    def make(train, test=None, num_classes=2):
        cfg = get_cfg()
        add_codetr_config(cfg)
        name = request.node.name
        cfg.DATASETS.COCO_JSON = [[f"{name}/train", *train]] + ([[f"{name}/test", *test]] if test else [])
        cfg.DATASETS.TRAIN = (f"{name}/train",)
        cfg.DATASETS.TEST = (f"{name}/test",) if test else ()
        cfg.MODEL.CODETR.NUM_CLASSES = num_classes
        cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = False
        return cfg

    return make
