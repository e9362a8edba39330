import copy

import numpy as np
import pycocotools.mask as mask_util
import pytest
import torch
import torch.nn.functional as F
from detectron2.config import get_cfg
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T
from detectron2.structures import BoxMode
from PIL import Image

from codetr_d2 import add_codetr_config
from codetr_d2.data import CoDETRDatasetMapper, build_augmentations, load_datasets, register_datasets
from codetr_d2.data.copy_paste import CutOuts, choose_objects, paste_objects
from codetr_d2.data.loader import _Samples
from codetr_d2.errors import InputError

SIDE = 128
COLOURS = np.array([(250, 0, 0), (0, 250, 0), (0, 0, 250), (250, 250, 0), (0, 250, 250)], np.uint8)


def make_objects(*boxes, classes=None):
    """Rectangles (x0, y0, x1, y1) on a canvas of 120 x 100."""
    masks = []
    for x0, y0, x1, y1 in boxes:
        mask = np.zeros((100, 120), np.uint8, order="F")
        mask[y0:y1, x0:x1] = 1
        masks.append(mask_util.encode(mask))
    return CutOuts((100, 120), np.array(range(len(boxes)) if classes is None else classes, dtype=np.int64), masks)


def test_what_is_covered_shrinks_or_goes():
    objects = make_objects(
        (10, 10, 110, 40),  # large, its left half covered: 1500 pixels are left
        (70, 60, 100, 75),  # covered by 18 columns of 30: 180 pixels are left, the box moves by 18
        (10, 60, 30, 70),  # covered by 5 columns of 20: few pixels are left, but the box moves by 5 alone
        (2, 2, 6, 6),  # all covered, and less than 10 pixels from the origin, where the box of no pixel lies
        (100, 80, 110, 90),  # seen as before
    )
    source = make_objects((0, 0, 60, 50), (70, 60, 88, 75), (25, 55, 40, 72), classes=[7, 8, 9])
    image, source_image = np.full((100, 120, 3), 1, np.uint8), np.full((100, 120, 3), 2, np.uint8)
    mixed, result = paste_objects(image, objects, source_image, source)
    assert result.classes.tolist() == [0, 2, 4, 7, 8, 9]
    assert result.boxes.tolist() == [
        *[[60, 10, 110, 40], [10, 60, 25, 70], [100, 80, 110, 90]],
        *source.boxes.tolist(),
    ]
    covered = source.to_instances(True).gt_masks.tensor.any(0).numpy()
    assert (mixed[covered] == 2).all() and (mixed[~covered] == 1).all()
    masks = result.to_instances(True).gt_masks.tensor.numpy()
    assert not (masks[:3].any(0) & covered).any() and (masks[3:].any(0) == covered).all()
    assert masks.sum((1, 2)).tolist() == result.areas.tolist()
    assert masks[0].sum() == 1500


def test_with_no_object_on_either_side():
    nothing, one = make_objects(), make_objects((10, 10, 20, 20))
    image, source_image = np.zeros((100, 120, 3), np.uint8), np.ones((100, 120, 3), np.uint8)
    mixed, result = paste_objects(image, one, source_image, nothing)
    assert (mixed == 0).all() and len(result) == 1
    mixed, result = paste_objects(image, nothing, source_image, one)
    assert mixed.sum() == 300 and len(result) == 1
    assert len(choose_objects(nothing, 100)) == 0


@pytest.mark.parametrize("max_num, numbers", [(100, {0, 1, 2, 3}), (2, {0, 1, 2}), (1, {0, 1})])
def test_a_random_number_of_random_objects_is_chosen(max_num, numbers):
    objects = make_objects((0, 0, 5, 5), (10, 0, 15, 5), (20, 0, 25, 5))
    np.random.seed(0)
    chosen = [choose_objects(objects, max_num).classes.tolist() for _ in range(200)]
    assert {len(x) for x in chosen} == numbers
    assert all(len(set(x)) == len(x) for x in chosen)
    counts = np.bincount(np.concatenate(chosen).astype(int), minlength=3)
    assert counts.min() > 0.6 * counts.max()


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.LARGE_SCALE_JITTER.ENABLED = True
    cfg.INPUT.LARGE_SCALE_JITTER.MIN_SCALE = 0.5
    cfg.INPUT.COPY_PASTE.ENABLED = True
    cfg.MODEL.CODETR.CANVAS_SIZE = SIDE
    cfg.MODEL.MASK_ON = True
    return cfg


@pytest.fixture
def records(tmp_path):
    """Three black pictures with rectangles, one of each class, which has a colour of its own. The last has none."""
    result = []
    for i, (width, height) in enumerate([(160, 120), (90, 140), (100, 100)]):
        pixels = np.zeros((height, width, 3), np.uint8)
        annotations = []
        for k, (x, y, w, h) in enumerate([(5, 8, 40, 50), (52, 20, 30, 60)] * (i < 2)):
            category = 2 * i + k
            pixels[y : y + h, x : x + w] = COLOURS[category]
            box = {"bbox": [x, y, w, h], "bbox_mode": BoxMode.XYWH_ABS, "category_id": category}
            polygon = [x, y, x + w, y, x + w, y + h, x, y + h]
            annotations.append({**box, "segmentation": [polygon]})
        path = str(tmp_path / f"{i}.png")
        Image.fromarray(pixels).save(path)
        size = {"width": width, "height": height}
        result.append({"file_name": path, "image_id": i, **size, "annotations": annotations})
    return result


def test_samples_hold_what_their_objects_say(cfg, records):
    mapper = CoDETRDatasetMapper(cfg, True, records=records)
    np.random.seed(0)
    seen = set()
    for i in range(45):
        sample = mapper(records[i % 3])
        instances, image = sample["instances"], sample["image"]
        assert image.shape == (3, SIDE, SIDE) and instances.image_size == (SIDE, SIDE)
        boxes, masks = instances.gt_boxes.tensor, instances.gt_masks.tensor
        assert torch.equal(boxes, instances.gt_masks.get_bounding_boxes().tensor)
        assert (boxes >= 0).all() and (boxes <= SIDE).all() and (boxes[:, 2:] > boxes[:, :2]).all()
        assert masks.sum(0).max() <= 1  # what is covered belongs to what covers it
        for category, mask in zip(instances.gt_classes.tolist(), masks):
            inside = -F.max_pool2d(-mask[None].float(), 5, 1, 2)[0] > 0  # off the blurred edge
            colour = torch.from_numpy(COLOURS[category]).int()
            assert ((image[:, inside].int() - colour[:, None]).abs() < 12).all()
            seen.add((i % 3, category))
        assert {"file_name", "image_id"} <= sample.keys() and "annotations" not in sample
    assert {(2, 0), (2, 3), (0, 2), (1, 0)} <= seen  # from other images
    assert {(0, 0), (1, 3)} <= seen  # from their own


def test_a_sample_depends_on_its_index_and_seed_alone(cfg, records):
    samples = _Samples(records, CoDETRDatasetMapper(cfg, True, records=records))
    first = samples[0, 5]
    np.random.rand(10)
    again, other = samples[0, 5], samples[0, 6]
    assert torch.equal(first["image"], again["image"]) and not torch.equal(first["image"], other["image"])
    assert torch.equal(first["instances"].gt_boxes.tensor, again["instances"].gt_boxes.tensor)


@pytest.mark.parametrize("encoded", [False, True])
def test_masks_are_those_of_detectron2_but_at_the_edge(cfg, records, encoded):
    """detectron2 clips polygons before it fills them."""
    cfg.INPUT.LARGE_SCALE_JITTER.MIN_SCALE = 0.8
    annotations = copy.deepcopy(records[0]["annotations"])
    angles = np.linspace(0, 2 * np.pi, 40, endpoint=False)
    ring = np.stack((80 + 70 * np.cos(angles), 60 + 50 * np.sin(angles)), axis=1)
    annotations[0]["segmentation"] = [ring.ravel().tolist(), [0.0, 0.0, 20.0, 0.0, 0.0, 20.0]]  # crops cut both
    annotations[1]["segmentation"] = [[float(x) for x in annotations[1]["segmentation"][0]]]
    annotations.append({**annotations[0], "iscrowd": 1})
    if encoded:
        for x in annotations:
            x["segmentation"] = mask_util.merge(mask_util.frPyObjects(x["segmentation"], 120, 160))
    before = copy.deepcopy(annotations)
    np.random.seed(0)
    compared = 0
    for _ in range(20):
        aug_input = T.AugInput(np.zeros((120, 160, 3), np.uint8))
        transforms = T.AugmentationList(build_augmentations(cfg, True))(aug_input)
        found = CutOuts.from_annotations(annotations, transforms, (SIDE, SIDE))
        assert annotations == before
        expected = [
            utils.transform_instance_annotations(copy.deepcopy(x), transforms, (SIDE, SIDE)) for x in annotations[:2]
        ]
        expected = utils.annotations_to_instances(expected, (SIDE, SIDE), "bitmask")
        expected = expected[expected.gt_masks.nonempty()]
        masks = found.to_instances(True).gt_masks.tensor
        assert found.classes.tolist() == expected.gt_classes.tolist()
        difference = masks ^ expected.gt_masks.tensor
        assert difference.sum() <= (0 if encoded else 4)
        np.testing.assert_allclose(found.boxes, expected.gt_masks.get_bounding_boxes().tensor, atol=1)
        compared += len(found)
    assert compared > 20


def test_without_a_mask_head_only_boxes_are_returned(cfg, records):
    cfg.MODEL.MASK_ON = False
    np.random.seed(0)
    fields = set(CoDETRDatasetMapper(cfg, True, records=records)(records[0])["instances"].get_fields())
    assert fields == {"gt_boxes", "gt_classes"}
    with pytest.raises(ValueError, match="records="):
        CoDETRDatasetMapper(cfg, True)
    assert "instances" not in CoDETRDatasetMapper(cfg, False)(records[0])


@pytest.mark.parametrize("option", ["INPUT.COPY_PASTE.ENABLED", "MODEL.MASK_ON"])
def test_annotations_without_masks_are_named(make_coco, make_cfg, option):
    def some_have_one(data):
        data["annotations"][0]["segmentation"] = [[4, 5, 14, 5, 14, 17, 4, 17]]

    cfg = make_cfg(make_coco(some_have_one))
    register_datasets(cfg)
    assert len(load_datasets(cfg, cfg.DATASETS.TRAIN, is_train=True)) == 2
    cfg.merge_from_list([option, True])
    with pytest.raises(
        InputError, match=rf'annotations\.json: annotations\[1\] \(id 2\) has no "segmentation".*{option}'
    ):
        load_datasets(cfg, cfg.DATASETS.TRAIN, is_train=True)


def test_encoded_masks_need_their_format(make_coco, make_cfg):
    def encode(data):
        for annotation in data["annotations"]:
            annotation["segmentation"] = {"size": [30, 40], "counts": [100, 50, 1050]}

    cfg = make_cfg(make_coco(encode))
    register_datasets(cfg)
    cfg.MODEL.MASK_ON = True
    with pytest.raises(InputError, match="annotations.json.*is an RLE.*Set INPUT.MASK_FORMAT bitmask"):
        load_datasets(cfg, cfg.DATASETS.TRAIN, is_train=True)
    cfg.INPUT.COPY_PASTE.ENABLED = True  # holds encodings itself
    records = load_datasets(cfg, cfg.DATASETS.TRAIN, is_train=True)
    cfg.INPUT.LARGE_SCALE_JITTER.ENABLED = True
    cfg.INPUT.LARGE_SCALE_JITTER.MIN_SCALE = cfg.INPUT.LARGE_SCALE_JITTER.MAX_SCALE = 1.0
    cfg.INPUT.RANDOM_FLIP = "none"
    cfg.MODEL.CODETR.CANVAS_SIZE = 40
    record = next(x for x in records if x["annotations"])
    np.random.seed(0)
    for _ in range(5):
        boxes = CoDETRDatasetMapper(cfg, True, records=records)(record)["instances"].gt_boxes.tensor
        assert len(boxes) and (boxes == torch.tensor([3.0, 0.0, 5.0, 30.0])).all()  # pixels 100 to 149, by columns
