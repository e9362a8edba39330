"""What real files hold: read where it has one meaning, named where it has none."""

import codecs
import copy
import json
import logging
import math
import zipfile

import numpy as np
import pycocotools.mask as mask_util
import pytest
from detectron2.data import DatasetCatalog, MetadataCatalog
from detectron2.structures import BoxMode
from PIL import Image

from codetr_d2.data import load_datasets, register_datasets
from codetr_d2.data.annotations import read_coco_json
from codetr_d2.data.datasets import annotated_images
from codetr_d2.errors import InputError

POLYGON = [4, 5, 14, 5, 14, 17, 4, 17]


def read(make_coco, change=None):
    _, path = make_coco(change)
    return read_coco_json(path, lambda image: image["file_name"])


def annotations_of(dataset):
    return [x for record in dataset.records for x in record["annotations"]]


def said(caplog):
    return [x.getMessage() for x in caplog.records if x.name.startswith("codetr_d2")]


@pytest.fixture
def log(caplog):
    with caplog.at_level(logging.INFO, logger="codetr_d2"):
        yield caplog


def whole_floats(data):
    for image in data["images"]:
        image.update(id=float(image["id"]), width=float(image["width"]), height=float(image["height"]))
    for x in data["annotations"]:
        x.update({key: float(x[key]) for key in ("id", "image_id", "category_id", "iscrowd")})


def texts(data):
    for image in data["images"]:
        image.update(width=str(image["width"]), height=f"{image['height']}.0")
    for x in data["annotations"]:
        x.update({key: str(x[key]) for key in ("image_id", "category_id", "iscrowd", "area")})
        x["bbox"] = [str(c) for c in x["bbox"]]


def uuids(data):
    for x in data["annotations"]:
        x["id"] = f"6a1c-{x['id']}"


def nulls(data):
    for x in data["annotations"]:
        x.update(area=None, iscrowd=None, segmentation=None, ignore=None)
    data["info"] = None


def unused(data):
    for x in data["annotations"]:
        x.update(keypoints=[[10, 12, 2], [14, 15, 2]], num_keypoints=2, attributes={"occluded": None})


@pytest.mark.parametrize("change", [whole_floats, texts, uuids, nulls, unused])
def test_what_has_one_meaning_is_read_as_that(make_coco, change):
    plain, other = read(make_coco), copy.deepcopy(read(lambda c: make_coco(c, "other"), change))
    assert annotations_of(other) == annotations_of(plain)
    for a, b in zip(other.records, plain.records):
        assert [a[key] for key in ("image_id", "width", "height")] == [
            b[key] for key in ("image_id", "width", "height")
        ]
        assert isinstance(a["width"], int) and isinstance(a["image_id"], int)


@pytest.mark.parametrize("mark, encoding", [(codecs.BOM_UTF8, "utf-8"), (b"", "utf-16"), (b"", "utf-8")])
def test_text_of_any_unicode(make_coco, mark, encoding):
    _, path = make_coco()
    with open(path) as file:
        data = json.load(file)
    data["categories"][0]["name"] = "Fisch größer als 魚"
    with open(path, "wb") as file:
        file.write(mark + json.dumps(data, ensure_ascii=False).encode(encoding))
    assert read_coco_json(path, str).categories[1]["name"] == "Fisch größer als 魚"


@pytest.mark.parametrize(
    "content, message",
    [
        ('{"categories": [{"name": "größer"}]}'.encode("latin-1"), "is not text in UTF-8.*Save it as UTF-8"),
        (b"<!DOCTYPE html><html></html>", "is a page in HTML"),
        (b"version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n", "pointer of Git LFS.*git lfs pull"),
        (b"\x1f\x8b\x08\x00", "is a gzip archive. Unpack it"),
        (b"[" * 100000, "is not readable JSON"),
    ],
)
def test_files_of_another_kind_are_called_what_they_are(make_coco, content, message):
    _, path = make_coco()
    with open(path, "wb") as file:
        file.write(content)
    with pytest.raises(InputError, match=message):
        read_coco_json(path, str)


def test_a_zip_that_is_named_json(make_coco):
    _, path = make_coco()
    with zipfile.ZipFile(path, "w") as archive:
        archive.writestr("annotations.json", "{}")
    with pytest.raises(InputError, match="annotations.json is a zip archive. Unpack it"):
        read_coco_json(path, str)


@pytest.mark.parametrize("area", [None, 0, -3, math.nan, math.inf, "nan"])
def test_areas_that_no_object_has_are_measured(make_coco, area):
    """By the mask, where there is one (half of the box here), or else by the box."""

    def change(data):
        data["annotations"][0].update(area=area, segmentation=[[4, 5, 14, 5, 4, 17]])
        data["annotations"][1].update(area=area)

    assert [x["area"] for x in annotations_of(read(make_coco, change))] == [60, 300]


def test_the_area_of_a_run_length_encoding(make_coco):
    counts = [155, 12, 18, 12, 1003]

    def change(data):
        data["annotations"][0].update(area=None, segmentation={"size": [30, 40], "counts": counts})

    annotation = annotations_of(read(make_coco, change))[0]
    assert annotation["area"] == 24
    expected = mask_util.decode(mask_util.frPyObjects({"size": [30, 40], "counts": counts}, 30, 40))
    assert (mask_util.decode(annotation["segmentation"]) == expected).all()


@pytest.mark.parametrize("segmentation", [[[1, 2, 3, 4]], [[]], [], "a.png", {"counts": 3}, [["a"] * 6], [None], 7, {}])
def test_what_is_no_mask_does_not_drop_its_box(make_coco, segmentation):
    def change(data):
        data["annotations"][0]["segmentation"] = segmentation

    dataset = read(make_coco, change)
    assert len(annotations_of(dataset)) == 2 and "segmentation" not in annotations_of(dataset)[0]
    assert "annotations[0] (id 1)" in dataset.maskless


@pytest.mark.parametrize("extra", [[1, 2, 3, 4], [], ["x"] * 6, [1, 2, 3, 4, 5, 6, 7], [1, 2, 3, 4, 5, math.nan]])
def test_the_good_polygons_are_left(make_coco, extra):
    def change(data):
        data["annotations"][0]["segmentation"] = [extra, POLYGON]

    assert annotations_of(read(make_coco, change))[0]["segmentation"] == [POLYGON]


def test_one_polygon_without_its_list(make_coco):
    def change(data):
        data["annotations"][0]["segmentation"] = POLYGON

    assert annotations_of(read(make_coco, change))[0]["segmentation"] == [POLYGON]


def test_one_line_says_what_is_used(make_coco, log):
    read(make_coco)
    assert len(said(log)) == 1
    assert "annotations.json: 2 images (1 of them without a box), 2 boxes, 0 crowds" in said(log)[0]
    assert log.records[-1].levelno == logging.INFO


def test_crowds_with_polygons_are_named(make_coco, log):
    def change(data):
        data["annotations"][1].update(iscrowd=1, segmentation=[POLYGON])

    read(make_coco, change)
    [line] = said(log)
    assert "1 boxes, 1 crowds (not trained on" in line and 'annotations[1] (id 2): set their "iscrowd" to 0' in line
    assert log.records[-1].levelno == logging.WARNING


def test_nothing_but_crowds_says_so(make_coco, make_cfg):
    def change(data):
        for x in data["annotations"]:
            x["iscrowd"] = True

    cfg = make_cfg(make_coco(change))
    register_datasets(cfg)
    with pytest.raises(InputError, match='all 2 are crowds .*"iscrowd": 1'):
        load_datasets(cfg, cfg.DATASETS.TRAIN, True)


def test_boxes_that_look_like_shares_of_the_image(make_coco, log):
    def change(data):
        for x in data["annotations"]:
            x["bbox"] = [x["bbox"][0] / 40, x["bbox"][1] / 30, x["bbox"][2] / 40, x["bbox"][3] / 30]

    read(make_coco, change)
    assert any("look like shares of the image" in x for x in said(log))
    log.clear()
    read(lambda change: make_coco(change, "fine"))
    assert not any("shares" in x for x in said(log))


def test_a_category_that_is_only_the_parent_of_others(make_coco, make_cfg, log):
    def change(data):
        for category in data["categories"]:
            category["supercategory"] = "animals"
        data["categories"].insert(0, {"id": 0, "name": "animals", "supercategory": "none"})

    cfg = make_cfg(make_coco(change))
    register_datasets(cfg)
    with pytest.raises(InputError, match="3 categories but.*'animals' has no annotations.*remove it.*NUM_CLASSES 3"):
        load_datasets(cfg, cfg.DATASETS.TRAIN, True)
    assert any("'animals' has no annotations and is only the supercategory" in x for x in said(log))
    cfg.MODEL.CODETR.NUM_CLASSES = 3
    assert len(load_datasets(cfg, cfg.DATASETS.TRAIN, True)) == 2


def test_a_parent_with_boxes_of_its_own_is_a_class(make_coco, log):
    def change(data):
        data["categories"][0]["name"] = "bird"  # of the first annotation; it is called like the parent of the second
        data["categories"][1].update(name="jay", supercategory="bird")

    assert read(make_coco, change).root_categories == []


def test_two_categories_of_one_name(make_coco, log):
    def change(data):
        data["categories"][0]["name"] = "bird"

    read(make_coco, change)
    assert any("2 categories are called 'bird' (ids 3, 7)" in x for x in said(log))


def test_names_that_were_written_on_windows(make_coco, make_cfg, log, tmp_path):
    def change(data):
        data["images"][0]["file_name"] = "sub\\deep\\a.png"

    folder, path = make_coco(change)
    (tmp_path / "coco" / "images" / "sub" / "deep").mkdir(parents=True)
    (tmp_path / "coco" / "images" / "a.png").rename(tmp_path / "coco" / "images" / "sub" / "deep" / "a.png")
    cfg = make_cfg((folder, path))
    register_datasets(cfg)
    assert load_datasets(cfg, cfg.DATASETS.TRAIN, True)[0]["file_name"].endswith("images/sub/deep/a.png")
    assert any("backslashes are taken for separators of folders in 1 file names" in x for x in said(log))


def test_a_test_set_without_annotations(make_coco, make_cfg):
    cfg = make_cfg(make_coco(), make_coco(lambda data: data.pop("annotations"), "test"))
    register_datasets(cfg)
    assert len(load_datasets(cfg, cfg.DATASETS.TRAIN, True)) == 2
    assert len(load_datasets(cfg, cfg.DATASETS.TEST, False)) == 2
    assert not annotated_images(cfg.DATASETS.TEST[0]).is_annotated
    with pytest.raises(InputError, match='has no list "annotations", so there is nothing to learn'):
        load_datasets(cfg, cfg.DATASETS.TEST, True)


def test_a_file_that_has_changed_is_read_again(make_coco, make_cfg):
    folder, path = make_coco()
    cfg = make_cfg((folder, path), (folder, path))
    register_datasets(cfg)
    assert annotated_images(cfg.DATASETS.TEST[0]) is annotated_images(cfg.DATASETS.TEST[0])
    with open(path) as file:
        data = json.load(file)
    del data["annotations"][0]
    with open(path, "w") as file:
        json.dump(data, file)
    assert len(annotations_of(annotated_images(cfg.DATASETS.TEST[0]))) == 1


# Datasets that are registered in Python.


@pytest.fixture
def register(tmp_path, make_cfg):
    """Register dataset dicts of two images with ``change`` made to them; return a config that has them as both sets."""

    def make(change=None, classes=("bird", "fish"), mode=BoxMode.XYXY_ABS):
        records = []
        for i in range(2):
            Image.fromarray(np.full((30, 40, 3), 9, np.uint8)).save(tmp_path / f"{i}.png")
            boxes = [{"bbox": [4, 5, 14, 17], "bbox_mode": mode, "category_id": c} for c in range(2)]
            record = {"file_name": str(tmp_path / f"{i}.png"), "height": 30, "width": 40, "image_id": i}
            records.append({**record, "annotations": boxes})
        for record in records:
            if change is not None:
                change(record)
        name = f"registered {tmp_path.name}"
        DatasetCatalog.register(name, lambda: records)
        if classes:
            MetadataCatalog.get(name).thing_classes = list(classes)
        cfg = make_cfg(("", ""))
        cfg.DATASETS.COCO_JSON = []
        cfg.DATASETS.TRAIN = cfg.DATASETS.TEST = (name,)
        return cfg

    return make


def set_annotations(**values):
    return lambda record: [x.update(values) for x in record["annotations"]]


def drop(*keys):
    def change(record):
        for key in keys:
            record.pop(key, None)
            for x in record.get("annotations", []):
                x.pop(key, None)

    return change


@pytest.mark.parametrize(
    "change, message",
    [
        (
            lambda r: [x.update(category_id=x["category_id"] + 1) for x in r["annotations"]],
            r"annotations\[1\] of .*0.png: "
            '"category_id" is 2; it counts from 0, so it must be at most 1',
        ),
        (set_annotations(category_id="bird"), '"category_id" is .bird.'),
        (drop("bbox_mode"), r'has no "bbox_mode" \(BoxMode.XYXY_ABS, or BoxMode.XYWH_ABS'),
        (set_annotations(bbox_mode=BoxMode.XYWHA_ABS), '"bbox_mode" is .*it may be BoxMode.XYXY_ABS'),
        (drop("bbox"), 'has no "bbox"'),
        (set_annotations(bbox=[1, 2, 3]), r'"bbox" is \[1, 2, 3\], not four numbers'),
        (drop("file_name"), 'record 0 has no "file_name"'),
        (lambda r: r.update(height="tall"), '"height" of .*0.png is .tall.'),
        (set_annotations(iscrowd=3), '"iscrowd" is 3'),
        (drop("image_id"), '0.png has no "image_id", which evaluation needs'),
        (lambda r: r.update(image_id=7), '1.png has the "image_id" 7 of another image'),
        (drop("annotations"), 'has no list "annotations", so there is nothing to learn'),
    ],
)
def test_dataset_dicts_at_fault_are_named_before_training(register, change, message):
    cfg = register(change)
    with pytest.raises(InputError, match=message) as error:
        load_datasets(cfg, cfg.DATASETS.TRAIN, True)
        load_datasets(cfg, cfg.DATASETS.TEST, False)
    assert "dataset" in str(error.value) and "\n" not in str(error.value)


@pytest.mark.parametrize(
    "change",
    [
        None,
        drop("image_id", "height", "width"),
        set_annotations(bbox=np.array([4.0, 5, 14, 17]), category_id=np.int64(1), iscrowd=np.False_),
        set_annotations(segmentation=(np.array(POLYGON), [[1, 2], [3, 4], [5, 9]])),
        set_annotations(segmentation=np.pad(np.ones((12, 10), bool), ((5, 13), (4, 26)))),
        set_annotations(segmentation=None, iscrowd=None),
    ],
)
def test_dataset_dicts_of_one_meaning_are_read(register, change):
    cfg = register(change)
    cfg.DATASETS.TEST = ()
    records = load_datasets(cfg, cfg.DATASETS.TRAIN, True)
    for x in (x for record in records for x in record["annotations"]):
        assert (x["bbox"], x["bbox_mode"], x["iscrowd"]) == ([4, 5, 10, 12], BoxMode.XYWH_ABS, 0)
        if isinstance(x.get("segmentation"), dict):
            assert mask_util.area(x["segmentation"]) == 120 == x["area"]


def test_registered_dicts_stay_as_they_are(register):
    cfg = register()
    before = copy.deepcopy(DatasetCatalog.get(cfg.DATASETS.TRAIN[0]))
    load_datasets(cfg, cfg.DATASETS.TRAIN, True)
    assert DatasetCatalog.get(cfg.DATASETS.TRAIN[0]) == before


def test_bad_boxes_of_registered_datasets_are_left_out(register, log):
    cfg = register(lambda r: r["annotations"][0].update(bbox=[math.nan, 5, 14, 17]))
    records = load_datasets(cfg, cfg.DATASETS.TEST, False)
    assert [len(x["annotations"]) for x in records] == [1, 1]
    assert any("2 boxes are left out" in x and "0.png" in x for x in said(log))


def test_class_indices_without_names(register):
    cfg = register(set_annotations(category_id=2), classes=())
    with pytest.raises(InputError, match="is 2; it counts from 0, so it must be at most 1"):
        load_datasets(cfg, cfg.DATASETS.TRAIN, True)
