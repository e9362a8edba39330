"""Masks through the trainer's evaluation."""

import json

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog
from detectron2.structures import BitMasks, Boxes, Instances
from PIL import Image
from pycocotools import mask as mask_util
from torch import nn

from codetr_d2 import add_codetr_config
from codetr_d2.data import register_datasets
from codetr_d2.engine.trainer import CoDETRTrainer

HEIGHT, WIDTH = 60, 80
POLYGONS = [[4, 5, 34, 8, 25, 40, 6, 30], [40, 10, 75, 12, 60, 50], [50, 20, 70, 22, 66, 58, 45, 50]]


@pytest.fixture
def cfg(tmp_path):
    """A test set of two pictures with three objects; one mask is an RLE."""
    images, annotations = [], []
    for i, polygons in enumerate((POLYGONS[:2], POLYGONS[2:]), 1):
        Image.fromarray(np.zeros((HEIGHT, WIDTH, 3), np.uint8)).save(tmp_path / f"{i}.png")
        images.append({"id": i, "file_name": f"{i}.png", "height": HEIGHT, "width": WIDTH})
        for polygon in polygons:
            [rle] = mask_util.frPyObjects([polygon], HEIGHT, WIDTH)
            box, area = mask_util.toBbox(rle).tolist(), float(mask_util.area(rle))
            rle["counts"] = rle["counts"].decode()
            segmentation = rle if i == 2 else [polygon]
            entry = {"id": len(annotations) + 1, "image_id": i, "category_id": 1, "iscrowd": 0}
            annotations.append({**entry, "bbox": box, "area": area, "segmentation": segmentation})
    data = {"info": {}, "images": images, "annotations": annotations, "categories": [{"id": 1, "name": "blob"}]}
    (tmp_path / "test.json").write_text(json.dumps(data))
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.MODEL.DEVICE = "cpu"
    cfg.MODEL.MASK_ON = True
    cfg.MODEL.CODETR.NUM_CLASSES = 1
    cfg.DATALOADER.NUM_WORKERS = 0
    cfg.INPUT.MIN_SIZE_TEST = HEIGHT
    cfg.DATASETS.COCO_JSON = [[str(tmp_path), str(tmp_path), str(tmp_path / "test.json")]]
    cfg.DATASETS.TEST = (str(tmp_path),)
    cfg.OUTPUT_DIR = str(tmp_path / "output")
    register_datasets(cfg)
    return cfg


class Oracle(nn.Module):
    """Finds every object twice: with its mask, and with the wrong half of its box as a mask, of the higher score."""

    def __init__(self, cfg, mask_scores: bool):
        super().__init__()
        self.truth = {x["image_id"]: x["annotations"] for x in DatasetCatalog.get(cfg.DATASETS.TEST[0])}
        self.mask_scores = mask_scores

    def forward(self, inputs):
        results = []
        for x in inputs:
            boxes, masks = [], []
            for annotation in self.truth[x["image_id"]]:
                left, top, width, height = annotation["bbox"]
                segmentation = annotation["segmentation"]
                if isinstance(segmentation, dict):
                    mask = torch.from_numpy(mask_util.decode(segmentation)).bool()
                else:
                    polygons = [[np.array(segmentation[0])]]
                    mask = BitMasks.from_polygon_masks(polygons, HEIGHT, WIDTH).tensor[0]
                half = torch.zeros(HEIGHT, WIDTH, dtype=torch.bool)
                half[int(top + height / 2) : int(top + height), int(left) : int(left + width)] = True
                boxes += 2 * [[left, top, left + width, top + height]]
                masks += [mask, half]
            found = Instances((HEIGHT, WIDTH), pred_boxes=Boxes(torch.tensor(boxes)), pred_masks=torch.stack(masks))
            found.scores = torch.tensor([0.6, 0.8]).repeat(len(boxes) // 2)
            found.pred_classes = torch.zeros(len(boxes), dtype=torch.int64)
            if self.mask_scores:
                found.mask_scores = torch.tensor([0.5, 0.1]).repeat(len(boxes) // 2)
            results.append({"instances": found})
        return results


def test_masks_are_ranked_by_their_own_scores(cfg, tmp_path):
    """Perfect masks score 100 if they come first; boxes are ranked by the boxes' scores in any case."""
    results = CoDETRTrainer.test(cfg, Oracle(cfg, mask_scores=True))
    assert list(results) == ["bbox", "segm"]
    assert results["segm"]["AP"] == pytest.approx(100)
    by_box = CoDETRTrainer.test(cfg, Oracle(cfg, mask_scores=False))
    assert by_box["bbox"] == pytest.approx(results["bbox"], nan_ok=True)
    assert by_box["segm"]["AP"] < 60

    CoDETRTrainer.test(cfg, Oracle(cfg, mask_scores=True))
    written = json.loads((tmp_path / "output" / "inference" / "coco_instances_results.json").read_text())
    assert {(round(x["score"], 2), round(x["mask_score"], 2)) for x in written} == {(0.6, 0.5), (0.8, 0.1)}
    assert {x["category_id"] for x in written} == {1} and all("counts" in x["segmentation"] for x in written)
