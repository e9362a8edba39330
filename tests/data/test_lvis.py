import json

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from codetr_d2.data import class_names, load_datasets
from codetr_d2.data.datasets import annotated_images
from codetr_d2.data.mapper import CoDETRDatasetMapper
from codetr_d2.errors import InputError


@pytest.fixture
def lvis(tmp_path, request):
    """Write a small LVIS data set and register it, without names of classes, under the name of the test."""

    def make(change=None):
        name = request.node.name
        (tmp_path / "coco" / "val2017").mkdir(parents=True)
        Image.fromarray(np.zeros((30, 40, 3), np.uint8)).save(tmp_path / "coco" / "val2017" / "7.png")
        rle = np.zeros((30, 40), np.uint8, order="F")
        rle[10:20, 5:25] = 1
        counts = [5 * 30 + 10, *[10, 20] * 19, 10, 30 * 15 + 10]  # column by column
        assert (mask_util.decode(mask_util.frPyObjects({"size": [30, 40], "counts": counts}, 30, 40)) == rle).all()
        polygon = [10, 2, 30, 2, 30, 8, 10, 8]
        data = {
            "images": [
                {
                    **{"id": 7, "width": 40, "height": 30, "coco_url": "http://images.cocodataset.org/val2017/7.png"},
                    **{"neg_category_ids": [1], "not_exhaustive_category_ids": []},
                }
            ],
            "annotations": [
                {"id": 1, "image_id": 7, "category_id": 3, "bbox": [10, 2, 20, 6], "segmentation": [polygon, [1, 2]]},
                {
                    **{"id": 2, "image_id": 7, "category_id": 2, "bbox": [5, 10, 20, 10]},
                    "segmentation": {"size": [30, 40], "counts": counts},
                },
            ],
            "categories": [{"id": i, "name": f"class{i}", "frequency": "f"} for i in (3, 1, 2)],
        }
        if change is not None:
            change(data)
        (tmp_path / "lvis.json").write_text(json.dumps(data))
        if name not in DatasetCatalog:
            DatasetCatalog.register(name, lambda: pytest.fail("this is detectron2's loader"))
        metadata = MetadataCatalog.get(name)
        metadata.set(json_file=str(tmp_path / "lvis.json"), evaluator_type="lvis")
        metadata.set(image_root=str(tmp_path / "coco"))
        return name

    return make


def test_an_lvis_file_is_loaded(lvis, make_cfg, tmp_path):
    name = lvis()
    cfg = make_cfg(("", ""), num_classes=3)
    cfg.DATASETS.TRAIN = (name,)
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MASK_FORMAT = "bitmask"
    cfg.INPUT.MIN_SIZE_TRAIN = (30,)
    cfg.INPUT.RANDOM_FLIP = "none"
    assert class_names(cfg) == ["class1", "class2", "class3"]
    (record,) = load_datasets(cfg, [name], is_train=True)
    assert record["file_name"] == str(tmp_path / "coco" / "val2017" / "7.png")
    assert (record["width"], record["height"], record["image_id"]) == (40, 30, 7)
    assert MetadataCatalog.get(name).thing_dataset_id_to_contiguous_id == {1: 0, 2: 1, 3: 2}
    instances = CoDETRDatasetMapper(cfg, True)(record)["instances"]
    assert instances.gt_classes.tolist() == [2, 1]
    assert instances.gt_boxes.tensor.tolist() == [[10, 2, 30, 8], [5, 10, 25, 20]]
    assert instances.gt_masks.get_bounding_boxes().tensor.tolist() == instances.gt_boxes.tensor.tolist()


@pytest.mark.parametrize(
    "change, message",
    [
        (lambda data: data.pop("categories"), r'lvis\.json has no list "categories"'),
        (
            lambda data: data["images"][0].pop("coco_url"),
            r"lvis\.json: images\[0\] lacks coco_url",
        ),
        (
            lambda data: data["annotations"][0].update(category_id=9),
            r"lvis\.json: annotations\[0\] \(id 1\): category_id 9",
        ),
        (
            lambda data: data["categories"][0].pop("frequency"),
            r"lvis\.json: .*'class3' has no \"frequency\"",
        ),
    ],
)
def test_faulty_files_are_named(lvis, change, message):
    name = lvis(change)
    with pytest.raises(InputError, match=message):
        annotated_images(name)


def test_the_file_of_another_dataset_is_refused(lvis):
    name = lvis()
    MetadataCatalog.get(name).thing_classes = ["one", "two"]
    with pytest.raises(InputError, match="has 3 categories, but .* registered with 2"):
        annotated_images(name)


@pytest.mark.parametrize("name", ["lvis_v1_train", "objects365_v2_val", "coco_2017_val"])
def test_folders_that_are_not_there_are_named(make_cfg, name):
    cfg = make_cfg(("", ""))
    with pytest.raises(
        InputError,
        match=rf"(lvis_v1_train|zhiyuan_objv2_val|instances_val2017)\.json of .*{name}.* "
        "does not exist.*DETECTRON2_DATASETS",
    ):
        load_datasets(cfg, [name], is_train=False)
