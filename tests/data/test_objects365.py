import json

import numpy as np
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from PIL import Image

from codetr_d2.data import load_datasets, objects365
from codetr_d2.errors import InputError

NAMES = ("objects365_v2_train", "objects365_v2_val")


@pytest.fixture
def root(tmp_path):
    """The names stand for a folder of this test, in which there is nothing yet."""
    before = {name: (DatasetCatalog.pop(name), MetadataCatalog.pop(name)) for name in NAMES}
    objects365.register_objects365(str(tmp_path))
    yield tmp_path / "objects365"
    for name, (function, metadata) in before.items():
        DatasetCatalog.pop(name)
        DatasetCatalog.register(name, function)
        MetadataCatalog[name] = metadata


def test_images_are_found_in_their_patches(root, make_cfg):
    (root / "annotations").mkdir(parents=True)
    images, annotations = [], []
    for i, patch in enumerate(["v1/patch8/objects365_v1_00000001.jpg", "v2/patch16/objects365_v2_00000002.jpg"], 1):
        path = root / "val" / patch.split("/", 1)[1]
        path.parent.mkdir(parents=True)
        Image.fromarray(np.full((30, 40, 3), i, np.uint8)).save(path)
        images.append({"id": i, "file_name": f"images/{patch}", "width": 40, "height": 30})
        box = {"bbox": [1, 2, 10, 5], "area": 50, "iscrowd": 0}
        annotations.append({"id": i, "image_id": i, "category_id": i, **box})
    categories = [{"id": 2, "name": "Sneakers"}, {"id": 1, "name": "Person"}]
    data = {"images": images, "annotations": annotations, "categories": categories}
    (root / "annotations" / "zhiyuan_objv2_val.json").write_text(json.dumps(data))

    dicts = load_datasets(make_cfg(("", "")), ["objects365_v2_val"], is_train=False)
    assert [x["file_name"] for x in dicts] == [
        str(root / "val" / "patch8" / "objects365_v1_00000001.jpg"),
        str(root / "val" / "patch16" / "objects365_v2_00000002.jpg"),
    ]
    assert [x["annotations"][0]["category_id"] for x in dicts] == [0, 1]
    assert MetadataCatalog.get("objects365_v2_val").thing_classes == ["Person", "Sneakers"]


def test_a_missing_folder_is_named(root, make_cfg):
    with pytest.raises(InputError, match=r"annotations/zhiyuan_objv2_train\.json of .* does not exist.*DETECTRON2_DAT"):
        load_datasets(make_cfg(("", "")), ["objects365_v2_train"], is_train=True)
