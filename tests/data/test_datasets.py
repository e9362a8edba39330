import contextlib
import copy
import io
import logging
import math
import os

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.evaluation import COCOEvaluator
from detectron2.structures import Boxes, Instances
from pycocotools.coco import COCO

from codetr_d2 import add_codetr_config
from codetr_d2.data import CoDETRDatasetMapper, class_names, load_datasets, register_datasets, register_metadata
from codetr_d2.data.datasets import annotated_images
from codetr_d2.errors import InputError
from codetr_d2.evaluation import average_precisions


def load(cfg, is_train=True):
    register_datasets(cfg)
    return load_datasets(cfg, cfg.DATASETS.TRAIN if is_train else cfg.DATASETS.TEST, is_train)


def test_loads_what_pycocotools_loads(make_coco, make_cfg):
    cfg = make_cfg(make_coco())
    dicts = load(cfg)
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(cfg.DATASETS.COCO_JSON[0][2])
    assert {d["image_id"] for d in dicts} == set(coco.getImgIds())
    names = [coco.cats[i]["name"] for i in sorted(coco.cats)]
    assert names == ["bird", "fish"] == class_names(cfg)
    for d in dicts:
        image = coco.imgs[d["image_id"]]
        assert (d["width"], d["height"]) == (image["width"], image["height"])
        assert os.path.basename(d["file_name"]) == image["file_name"]
        expected = coco.loadAnns(coco.getAnnIds(d["image_id"]))
        assert [x["bbox"] for x in d["annotations"]] == [x["bbox"] for x in expected]
        # contiguous class index -> name, against COCO's own id -> name
        assert [names[x["category_id"]] for x in d["annotations"]] == [
            coco.cats[x["category_id"]]["name"] for x in expected
        ]


def test_names_of_the_classes_before_anything_is_loaded(make_coco, make_cfg):
    cfg = make_cfg(make_coco())
    register_datasets(cfg)
    assert class_names(cfg) == ["bird", "fish"]
    cfg.MODEL.CODETR.CLASS_NAMES = ["a", "b"]
    assert class_names(cfg) == ["a", "b"]


def test_images_without_objects_are_kept_unless_filtered(make_coco, make_cfg):
    cfg = make_cfg(make_coco())
    assert len(load(cfg)) == 2
    cfg.DATALOADER.FILTER_EMPTY_ANNOTATIONS = True
    assert [len(d["annotations"]) for d in load(cfg)] == [2]


def test_registering_again_changes_nothing_but_another_folder_is_an_error(make_coco, make_cfg):
    cfg = make_cfg(make_coco())
    register_datasets(cfg)
    register_datasets(cfg)
    other = make_coco(folder="other")
    cfg.DATASETS.COCO_JSON[0][1:] = other
    with pytest.raises(InputError, match="is taken"):
        register_datasets(cfg)
    cfg.DATASETS.COCO_JSON[0][0] = "coco_2017_train"
    with pytest.raises(InputError, match="coco_2017_train.*is taken"):
        register_datasets(cfg)


def test_config_keeps_the_datasets_in_a_file(make_coco, make_cfg, tmp_path):
    cfg = make_cfg(make_coco())
    (tmp_path / "config.yaml").write_text(cfg.dump())
    again = get_cfg()
    add_codetr_config(again)
    again.merge_from_file(str(tmp_path / "config.yaml"))
    assert len(load(again)) == 2


@pytest.mark.parametrize("entry", ["name", ["name", "folder"], ["name", "folder", 3]])
def test_entries_that_are_no_dataset(make_coco, make_cfg, entry):
    cfg = make_cfg(make_coco())
    cfg.DATASETS.COCO_JSON = [entry]
    with pytest.raises(InputError, match="COCO_JSON"):
        register_datasets(cfg)


def test_files_that_are_not_there_matter_where_they_are_used(make_coco, make_cfg):
    """Evaluation does not need the training set."""
    folder, annotation_json = make_coco()
    cfg = make_cfg(("/gone", "/gone.json"), (folder, annotation_json))
    assert len(load(cfg, is_train=False)) == 2
    with pytest.raises(InputError, match="image folder /gone of dataset .* does not exist. Correct DATASETS.COCO_JSON"):
        load(cfg)
    cfg.DATASETS.COCO_JSON[0] = ["gone json", folder, "/gone.json"]
    cfg.DATASETS.TRAIN = ("gone json",)
    with pytest.raises(InputError, match="annotation file /gone.json of dataset .* does not exist"):
        load(cfg)


def test_unregistered_and_absent_datasets(make_coco, make_cfg, monkeypatch, tmp_path):
    cfg = make_cfg(make_coco())
    register_datasets(cfg)
    with pytest.raises(InputError, match="'nowhere'.*DATASETS.COCO_JSON"):
        load_datasets(cfg, ["nowhere"], True)
    with pytest.raises(InputError, match="DATASETS.TEST is empty"):
        load_datasets(cfg, [], False)
    if not os.path.exists(MetadataCatalog.get("coco_2017_val").json_file):
        with pytest.raises(InputError, match="coco_2017_val.*DETECTRON2_DATASETS"):
            load_datasets(cfg, ["coco_2017_val"], False)


def set_in(*keys):
    """A change that sets data[key][key]... to the last argument."""

    def change(data):
        *path, last, value = keys
        for key in path:
            data = data[key]
        data[last] = value

    return change


def remove(*keys):
    def change(data):
        *path, last = keys
        for key in path:
            data = data[key]
        del data[last]

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (remove("images"), '"images"'),
        (remove("categories"), '"categories"'),
        (set_in("images", []), '"images" is empty'),
        (set_in("images", 0, "x"), r"images\[0\]"),
        (remove("images", 1, "id"), r"images\[1\] lacks id"),
        (remove("images", 0, "file_name"), r"images\[0\] lacks file_name"),
        (remove("images", 0, "width"), r"images\[0\] lacks width"),
        (set_in("images", 0, "height", 0), r"images\[0\] \(a.png\).*height"),
        (set_in("images", 0, "height", "30 px"), r"images\[0\] \(a.png\).*height"),
        (set_in("images", 1, "id", 11), r"images\[1\] \(b.png\) has the id 11"),
        (set_in("categories", []), '"categories" is empty'),
        (set_in("categories", 0, "id", 3), r"categories\[1\] has the id 3"),
        (remove("categories", 0, "name"), r"categories\[0\]"),
        (set_in("annotations", 1, 7), r"annotations\[1\]"),
        (remove("annotations", 1, "bbox"), r"annotations\[1\] lacks bbox"),
        (remove("annotations", 1, "id"), r"annotations\[1\] lacks id"),
        (remove("annotations", 0, "category_id"), r"annotations\[0\] lacks category_id"),
        (remove("annotations", 0, "image_id"), r"annotations\[0\] lacks image_id"),
        (set_in("annotations", 1, "id", 1), r"annotations\[1\].*id"),
        (set_in("annotations", 1, "bbox", [1, 2, 3]), r"annotations\[1\] \(id 2\).*bbox"),
        (set_in("annotations", 1, "bbox", [1, 2, 3, "x"]), r"annotations\[1\] \(id 2\).*bbox"),
        (set_in("annotations", 1, "category_id", 4), r"annotations\[1\] \(id 2\).*category_id 4.*3, 7"),
        (set_in("annotations", 1, "image_id", 12), r"annotations\[1\] \(id 2\).*image_id 12"),
        (set_in("annotations", 1, "ignore", 1), r"annotations\[1\] \(id 2\).*ignore"),
        (set_in("annotations", 1, "area", "large"), r"annotations\[1\] \(id 2\).*\"area\" is 'large'"),
        (set_in("annotations", 1, "iscrowd", 2), r'annotations\[1\] \(id 2\).*"iscrowd" is 2'),
        (set_in("annotations", 1, "id", 1.5), r'annotations\[1\]: "id" is 1.5; it must be a whole number'),
        (set_in("images", 1, "width", 20.5), r"images\[1\] \(b.png\).*whole numbers of pixels.*20.5"),
        (set_in("annotations", {}), r'"annotations" is no list'),
        (set_in("images", 0, "file_name", "c.png"), "1 of the 2 images.*c.png"),
        (set_in("images", 0, "width", 41), "a.png is 40 x 30 pixels.*41 x 30"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test"])
def test_malformed_annotations(make_coco, make_cfg, change, message, split):
    """Faults of the test set stop the training too, before it starts."""
    good, bad = make_coco(), make_coco(change, "bad")
    cfg = make_cfg(bad, good) if split == "train" else make_cfg(good, bad)
    with pytest.raises(InputError, match=message) as error:
        load(cfg)
    assert "bad" in str(error.value)  # the path
    assert "\n" not in str(error.value)


def test_no_box_to_train_on(make_coco, make_cfg):
    with pytest.raises(InputError, match="has a valid box"):
        load(make_cfg(make_coco(set_in("annotations", []), "none"), make_coco()))


def test_a_test_set_may_have_no_box(make_coco, make_cfg):
    dicts = load(make_cfg(make_coco(), make_coco(set_in("annotations", []), "none")), is_train=False)
    assert len(dicts) == 2 and not any(x["annotations"] for x in dicts)


@pytest.mark.parametrize("text", ["", "{", "[1]", "\x00\x01"])
def test_files_that_are_no_annotations(make_coco, make_cfg, text):
    folder, annotation_json = make_coco()
    with open(annotation_json, "w") as file:
        file.write(text)
    with pytest.raises(InputError, match="annotations.json"):
        load(make_cfg((folder, annotation_json)))


def test_number_and_names_of_the_classes(make_coco, make_cfg):
    with pytest.raises(InputError, match="2 categories.*NUM_CLASSES is 80.*NUM_CLASSES 2"):
        load(make_cfg(make_coco(), num_classes=80))
    cfg = make_cfg(make_coco(folder="second"))
    cfg.DATASETS.COCO_JSON[0][0] += "/2"
    cfg.DATASETS.TRAIN = (cfg.DATASETS.COCO_JSON[0][0],)
    cfg.MODEL.CODETR.CLASS_NAMES = ["bird", "dog"]
    with pytest.raises(InputError, match="CLASS_NAMES.*class 1 is 'dog' and 'fish'"):
        load(cfg)


def test_train_and_test_categories_must_agree(make_coco, make_cfg):
    renamed = make_coco(set_in("categories", 0, "name", "cat"), "renamed")
    with pytest.raises(InputError, match="different categories.*class 1 is 'fish' and 'cat'"):
        load(make_cfg(make_coco(), renamed))


def bad_boxes(data):
    bad = [[0, 0, 0, 5], [5, 5, -3, 2], [math.nan, 0, 3, 3], [50, 2, 5, 5], [30, 20, 20, 5]]
    for i, box in enumerate(bad, 10):
        data["annotations"].append({"id": i, "image_id": 11, "category_id": 3, "bbox": box, "area": 1, "iscrowd": 0})


def test_boxes_that_are_degenerate_or_outside(make_coco, make_cfg, caplog):
    with caplog.at_level(logging.WARNING, logger="codetr_d2"):
        dicts = load(make_cfg(make_coco(bad_boxes)))
    warnings = [x.getMessage() for x in caplog.records if x.name.startswith("codetr_d2")]
    assert len(warnings) == 1 and "4 boxes are left out" in warnings[0] and "1 that overhang" in warnings[0]
    assert "a.png" in warnings[0]
    boxes = [x["bbox"] for d in dicts for x in d["annotations"]]
    assert boxes == [[4, 5, 10, 12], [20, 1, 15, 20], [30, 20, 10, 5]]


def test_only_bad_boxes(make_coco, make_cfg):
    def change(data):
        data["annotations"] = []
        bad_boxes(data)
        del data["annotations"][-1]

    with pytest.raises(InputError, match="has a valid box"):
        load(make_cfg(make_coco(change)))


def detect_exactly(records):
    """Detections of nothing but the boxes that were loaded, as COCO results."""
    return [
        {"image_id": d["image_id"], "category_id": x["category_id"], "bbox": x["bbox"], "score": 1.0}
        for d in records
        for x in d["annotations"]
    ]


def without_area(data):
    for annotation in data["annotations"]:
        del annotation["area"], annotation["iscrowd"]
    del data["info"]


@pytest.mark.parametrize("change", [None, bad_boxes, without_area])
def test_evaluation_scores_against_the_boxes_that_are_used(make_coco, make_cfg, tmp_path, change):
    """Perfect detections score 100, also with unusable boxes in the file or without keys that pycocotools needs.

    So they do in detectron2's own evaluator.
    """
    coco = make_coco(change)
    cfg = make_cfg(coco, coco)
    records = load(cfg, is_train=False)
    name = cfg.DATASETS.TEST[0]
    assert average_precisions(annotated_images(name), detect_exactly(records), "bbox", "coco")["AP"] == 100
    evaluator = COCOEvaluator(name, distributed=False, output_dir=str(tmp_path / "inference"))
    evaluator.reset()
    for d in records:
        boxes = torch.tensor([x["bbox"] for x in d["annotations"]], dtype=torch.float32).reshape(-1, 4)
        boxes[:, 2:] += boxes[:, :2]
        found = Instances((d["height"], d["width"]), pred_boxes=Boxes(boxes), scores=torch.ones(len(boxes)))
        found.pred_classes = torch.tensor([x["category_id"] for x in d["annotations"]], dtype=torch.int64)
        evaluator.process([d], [{"instances": found}])
    assert evaluator.evaluate()["bbox"]["AP"] == pytest.approx(100)


def test_faulty_image_files(make_coco, make_cfg):
    folder, annotation_json = make_coco()
    path = os.path.join(folder, "a.png")
    with open(path, "rb") as file:
        content = file.read()
    with open(path, "wb") as file:
        file.write(content[: len(content) // 2])
    with pytest.raises(InputError, match="a.png is truncated"):
        load(make_cfg((folder, annotation_json)))


def test_metadata_of_a_saved_config(make_coco, make_cfg):
    cfg = make_cfg(make_coco(), ("nowhere", "nowhere.json"))
    cfg.MODEL.CODETR.CLASS_NAMES = ["bird", "fish"]
    register_metadata(cfg)
    register_metadata(cfg)
    assert MetadataCatalog.get(cfg.DATASETS.TEST[0]).thing_classes == ["bird", "fish"]
    assert cfg.DATASETS.TEST[0] not in DatasetCatalog


def test_crowds_alone_are_nothing_to_learn(make_coco, make_cfg):
    def change(data):
        for annotation in data["annotations"]:
            annotation["iscrowd"] = 1

    with pytest.raises(InputError, match="has a valid box"):
        load(make_cfg(make_coco(change)))


RLE = {"size": [30, 40], "counts": [155, 12, 18, 12, 18, 12, 18, 12, 943]}  # columns 5 to 8, rows 5 to 16


def masks(*segmentations):
    """Give the annotations these masks."""

    def change(data):
        for annotation, segmentation in zip(data["annotations"], segmentations):
            annotation["segmentation"] = segmentation

    return change


POLYGON = [[4, 5, 14, 5, 14, 17]]


@pytest.mark.parametrize(
    "segmentations",
    [
        (POLYGON,),
        (POLYGON, []),
        (POLYGON, None),
        (POLYGON, [[4, 5, 14, 5]]),
        (POLYGON, [["a"] * 6]),
        (POLYGON, [4, 5, 14, 5]),
        (POLYGON, {"counts": [1200], "size": [40, 30]}),
        (POLYGON, {"counts": [9], "size": [30, 40]}),
        (POLYGON, {"size": [30, 40]}),
        (POLYGON, "a.png"),
    ],
)
@pytest.mark.parametrize("split", ["train", "test", "test of a training"])
def test_masks_that_are_missing_where_the_model_has_masks(make_coco, make_cfg, segmentations, split):
    bad, good = make_coco(masks(*segmentations)), make_coco(masks(POLYGON, POLYGON), "good")
    cfg = make_cfg(bad if split == "train" else good, good if split == "train" else bad)
    cfg.MODEL.MASK_ON = True
    message = r'annotations.json: annotations\[1\] \(id 2\) has (no|not a valid) "segmentation".*MODEL.MASK_ON False'
    with pytest.raises(InputError, match=message):
        load(cfg, is_train=split != "test")
    cfg.MODEL.MASK_ON = False
    load(cfg)


def test_other_datasets_need_masks_too(make_coco, make_cfg, request):
    """Those that are registered by other code have no annotation file to name."""
    name = f"{request.node.name}/own"
    cfg = make_cfg(make_coco(masks(POLYGON, POLYGON)))
    cfg.MODEL.MASK_ON = True
    dicts = copy.deepcopy(load(cfg))
    [annotations] = [x["annotations"] for x in dicts if x["annotations"]]
    del annotations[1]["segmentation"]
    DatasetCatalog.register(name, lambda: dicts)
    MetadataCatalog.get(name).thing_classes = ["bird", "fish"]
    cfg.DATASETS.TRAIN = (name,)
    with pytest.raises(InputError, match=f'dataset .{name}.: annotations.1. of .*a.png has no "segmentation"'):
        load(cfg)


def test_run_lengths_need_bitmasks(make_coco, make_cfg):
    cfg = make_cfg(make_coco(masks(POLYGON, RLE)))
    cfg.MODEL.MASK_ON = True
    with pytest.raises(InputError, match="annotations.json.*is an RLE.*Set INPUT.MASK_FORMAT bitmask"):
        load(cfg)
    cfg.INPUT.MASK_FORMAT = "bitmask"
    mapper = CoDETRDatasetMapper(cfg, is_train=True)
    cfg.INPUT.RANDOM_FLIP = "none"
    [instances] = [x for x in (mapper(d)["instances"] for d in load(cfg)) if len(x)]
    assert instances.gt_masks.tensor.shape[0] == 2


def test_crowds_may_be_run_lengths(make_coco, make_cfg):
    def change(data):
        masks(POLYGON, RLE)(data)
        data["annotations"][1]["iscrowd"] = 1

    cfg = make_cfg(make_coco(change))
    cfg.MODEL.MASK_ON = True
    assert len(load(cfg)) == 2
