import copy

import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data import transforms as T
from detectron2.data.transforms import AugInput, AugmentationList
from detectron2.structures import BitMasks, BoxMode
from PIL import Image
from pycocotools import mask as mask_util

from codetr_d2 import add_codetr_config
from codetr_d2.data import CoDETRDatasetMapper, build_augmentations
from codetr_d2.data.mapper import _Picture
from codetr_d2.errors import InputError

COLOURS = [(255, 0, 0), (0, 255, 0), (0, 0, 255)]


@pytest.fixture
def cfg():
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.INPUT.FORMAT = "RGB"
    cfg.INPUT.MIN_SIZE_TRAIN = (480, 512, 800)
    cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING = "choice"
    cfg.INPUT.CROP.TYPE = "absolute_range"
    cfg.INPUT.CROP.SIZE = [384, 600]
    return cfg


@pytest.fixture
def record(tmp_path):
    """A 640 x 480 picture with three rectangles of pure colours, one for each class."""
    pixels = np.zeros((480, 640, 3), np.uint8)
    annotations = []
    for category, (x, y, w, h) in enumerate([(20, 30, 200, 120), (330, 60, 150, 300), (100, 320, 180, 100)]):
        pixels[y : y + h, x : x + w] = COLOURS[category]
        annotations.append({"bbox": [x, y, w, h], "bbox_mode": BoxMode.XYWH_ABS, "category_id": category})
    Image.fromarray(pixels).save(tmp_path / "x.png")
    return {
        "file_name": str(tmp_path / "x.png"),
        "width": 640,
        "height": 480,
        "image_id": 1,
        "annotations": annotations,
    }


def pixel_extent(image: torch.Tensor, category: int) -> list[float] | None:
    """xyxy of the pixels of a class's colour, or None where it has none."""
    colour = torch.tensor(COLOURS[category]).view(3, 1, 1) > 0
    mask = ((image >= 128) == colour).all(0)  # half-way to the black background
    if not mask.any():
        return None
    rows, columns = mask.any(1).nonzero(), mask.any(0).nonzero()
    return [columns.min().item(), rows.min().item(), columns.max().item() + 1, rows.max().item() + 1]


@pytest.mark.parametrize("crop", [False, True])
def test_boxes_stay_with_their_pixels(cfg, record, crop):
    cfg.INPUT.CROP.ENABLED = crop
    mapper = CoDETRDatasetMapper(cfg, is_train=True)
    np.random.seed(0)
    short_sides, cropped, flipped = set(), 0, 0
    for _ in range(24):
        mapped = mapper(record)
        image, instances = mapped["image"], mapped["instances"]
        assert image.dtype == torch.uint8 and instances.image_size == tuple(image.shape[1:])
        assert mapped["file_name"] == record["file_name"] and "annotations" not in mapped
        short_sides.add(min(instances.image_size))
        found = dict(zip(instances.gt_classes.tolist(), instances.gt_boxes.tensor.tolist()))
        for category in range(3):
            extent = pixel_extent(image, category)
            if extent is None:  # cropped away, but for slivers that interpolation swallows
                assert (
                    category not in found
                    or min(found[category][2] - found[category][0], found[category][3] - found[category][1]) < 3
                )
            else:
                np.testing.assert_allclose(found[category], extent, atol=4)  # a crop is enlarged up to twice
        cropped += not np.isclose(image.shape[2] / image.shape[1], 640 / 480, rtol=0.01)
        flipped += len(found) == 3 and found[0][0] > found[1][0]
    assert short_sides <= {480, 512, 800} and len(short_sides) == 3
    assert 0 < flipped < 24
    assert (4 < cropped < 20) if crop else cropped == 0


def test_crop_sizes_are_those_of_detr(cfg):
    """Before the last resize, a cropped image has sides of 384 to 600 pixels, as far as it is that large."""
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)  # no last resize
    cfg.INPUT.RANDOM_FLIP = "none"
    augmentations = build_augmentations(cfg, is_train=True)
    np.random.seed(1)
    shapes = []
    for _ in range(60):
        aug_input = AugInput(np.zeros((900, 1200, 3), np.uint8))
        AugmentationList(augmentations)(aug_input)
        shapes.append(aug_input.image.shape[:2])
    cropped = np.array([x for x in shapes if x != (900, 1200)])
    assert 15 <= len(cropped) <= 45
    assert cropped.min() >= 384 and cropped.max() <= 600
    assert len(np.unique(cropped)) > 20


def test_wide_images_are_limited_before_the_crop(cfg):
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.MIN_SIZE_TRAIN = (0,)
    augmentations = build_augmentations(cfg, is_train=True)
    np.random.seed(0)
    heights = set()
    for _ in range(20):
        aug_input = AugInput(np.zeros((50, 4000, 3), np.uint8))
        AugmentationList(augmentations)(aug_input)
        heights.add(aug_input.image.shape[0])
    assert heights == {50, 53}  # a short side of 400 would make the long one 32000 pixels, not 4200


@pytest.mark.parametrize("height, width", [(800, 1066), (97, 130), (480, 20), (40, 20), (150, 200)])
@pytest.mark.parametrize("flipped", [False, True])
def test_pictures_are_resized_as_by_pillow(height, width, flipped):
    """Up, down and not at all, but for a level of brightness in few pixels."""
    rough = np.random.default_rng(0).integers(0, 256, (15, 20, 3), dtype=np.uint8)
    pixels = np.array(Image.fromarray(rough).resize((200, 150), Image.Resampling.BICUBIC))[:, :: -1 if flipped else 1]
    resize = T.ResizeTransform(150, 200, height, width)
    picture = _Picture(pixels)
    picture.transform(resize)
    expected = resize.apply_image(pixels)
    difference = np.abs(picture.image.astype(int) - expected)
    assert picture.image.dtype == np.uint8 and picture.image.shape == (height, width, 3)
    assert difference.max() <= 2 and (difference > 0).mean() < 0.01


def test_pictures_are_padded_and_transformed_as_by_detectron2():
    pixels = np.random.default_rng(0).integers(0, 256, (20, 30, 3), dtype=np.uint8)
    transforms = T.TransformList([T.HFlipTransform(30), T.PadTransform(1, 2, 3, 4, 30, 20, 114.0, 0)])
    fill_up = T.FixedSizeCrop((40, 25), pad_value=114.0).get_transform(transforms.transforms[1].apply_image(pixels))
    picture, expected = _Picture(pixels), AugInput(pixels)
    for part in (transforms, fill_up):
        picture.transform(part)
        for x in part.transforms:
            expected.transform(x)
    np.testing.assert_array_equal(picture.image, expected.image)
    assert picture.image.shape == (40, 25, 3)


def test_boxes_may_be_given_in_several_ways_and_stay_as_they_were(cfg, record):
    boxes = []
    for masks in (False, True):
        cfg.MODEL.MASK_ON = masks
        for mode in (BoxMode.XYWH_ABS, BoxMode.XYXY_ABS):
            mixed = copy.deepcopy(record)
            add_polygons(mixed)
            x, y, w, h = mixed["annotations"][1]["bbox"]
            if mode == BoxMode.XYXY_ABS:
                mixed["annotations"][1].update(bbox=(x, y, x + w, y + h), bbox_mode=mode)
            before = copy.deepcopy(mixed)
            np.random.seed(2)
            boxes.append(CoDETRDatasetMapper(cfg, is_train=True)(mixed)["instances"].gt_boxes.tensor)
            assert mixed == before
    assert len(boxes[0]) == 3
    for other in boxes[1:]:
        torch.testing.assert_close(other, boxes[0])


def test_no_crop_in_evaluation(cfg, record):
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.MIN_SIZE_TEST = 240
    before = copy.deepcopy(record)
    mapped = CoDETRDatasetMapper(cfg, is_train=False)(record)
    assert record == before
    assert mapped["image"].shape == (3, 240, 320)
    assert (mapped["height"], mapped["width"]) == (480, 640)
    assert "instances" not in mapped and "annotations" not in mapped


def test_objects_that_are_cropped_away_leave_an_image_without_objects(cfg, record):
    cfg.INPUT.CROP.ENABLED = True
    cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE = "absolute", [40, 40]
    record["annotations"] = record["annotations"][2:]
    mapper = CoDETRDatasetMapper(cfg, is_train=True)
    np.random.seed(0)
    counts = {len(mapper(record)["instances"]) for _ in range(20)}
    assert counts == {0, 1}
    record["annotations"] = []
    assert mapper(record)["instances"].gt_boxes.tensor.shape == (0, 4)


def test_crowds_are_left_out(cfg, record):
    record["annotations"][0]["iscrowd"] = 1
    assert CoDETRDatasetMapper(cfg, is_train=True)(record)["instances"].gt_classes.tolist() == [1, 2]


def test_channels_are_in_the_order_of_the_config(cfg, record):
    cfg.INPUT.RANDOM_FLIP = "none"
    rgb = CoDETRDatasetMapper(cfg, is_train=False)(record)["image"]
    cfg.INPUT.FORMAT = "BGR"
    bgr = CoDETRDatasetMapper(cfg, is_train=False)(record)["image"]
    assert torch.equal(rgb, bgr.flip(0)) and not torch.equal(rgb, bgr)


def test_sizes_and_faulty_files(cfg, record):
    mapper = CoDETRDatasetMapper(cfg, is_train=True)
    with pytest.raises(InputError, match="x.png is 640 x 480 pixels"):
        mapper({**record, "width": 480})
    without_size = {k: v for k, v in record.items() if k not in ("width", "height")}
    mapped = mapper(without_size)
    assert (mapped["width"], mapped["height"]) == (640, 480)
    with open(record["file_name"], "r+b") as file:
        file.truncate(1000)
    with pytest.raises(InputError, match="x.png is truncated"):
        mapper(record)


def add_polygons(record):
    for annotation in record["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]


@pytest.fixture
def jitter(cfg):
    cfg.INPUT.LARGE_SCALE_JITTER.ENABLED = True
    cfg.MODEL.CODETR.CANVAS_SIZE = 400
    return cfg


@pytest.mark.parametrize("masks", [False, True])
def test_large_scale_jitter_keeps_boxes_on_a_square_canvas(jitter, record, masks):
    for annotation in record["annotations"]:
        x, y, w, h = annotation["bbox"]
        annotation["segmentation"] = [[x, y, x + w, y, x + w, y + h, x, y + h]]
    jitter.MODEL.MASK_ON = masks
    mapper = CoDETRDatasetMapper(jitter, is_train=True)
    np.random.seed(0)
    longer, offsets, flipped = [], [], 0
    for _ in range(60):
        mapped = mapper(record)
        image, instances = mapped["image"], mapped["instances"]
        assert image.shape == (3, 400, 400) and instances.image_size == (400, 400)
        found = dict(zip(instances.gt_classes.tolist(), instances.gt_boxes.tensor.tolist()))
        for category in range(3):
            extent = pixel_extent(image, category)
            if extent is not None:
                np.testing.assert_allclose(found[category], extent, atol=3)
        picture = (image != 114).any(0)  # the rest is the canvas, at the right and the bottom
        height, width = int(picture.any(1).sum()), int(picture.any(0).sum())
        assert picture[:height, :width].all()
        longer.append(width)
        if width < 400:
            assert height / width == pytest.approx(480 / 640, abs=1.5 / width)
            flipped += found[0][0] > found[1][0]
        elif {0, 2} <= found.keys():
            offsets.append((found[0][0], found[0][1]))
        if masks:
            expected = instances.gt_masks.get_bounding_boxes().tensor
            np.testing.assert_allclose(instances.gt_boxes.tensor, expected, atol=1e-3)
    small = [x for x in longer if x < 400]
    assert 15 <= len(small) <= 45 and min(small) >= 40 and min(small) < 90 and max(small) > 300
    assert 0 < flipped < len(small)
    assert len({x for x, _ in offsets}) > 3 and len({y for _, y in offsets}) > 3


def test_large_scale_jitter_leaves_evaluation_alone(jitter, record):
    jitter.INPUT.MIN_SIZE_TEST = jitter.INPUT.MAX_SIZE_TEST = 400
    assert CoDETRDatasetMapper(jitter, is_train=False)(record)["image"].shape == (3, 300, 400)


def test_large_scale_jitter_of_a_thin_picture(jitter):
    jitter.INPUT.LARGE_SCALE_JITTER.MAX_SCALE = 0.2
    augmentations = AugmentationList(build_augmentations(jitter, is_train=True))
    aug_input = AugInput(np.zeros((2, 900, 3), np.uint8))
    augmentations(aug_input)
    assert aug_input.image.shape == (400, 400, 3) and (aug_input.image == 0).any()


@pytest.mark.parametrize("recipe", ["resize", "crop", "jitter"])
def test_whole_numbers_are_as_exact_as_fractions(cfg, record, recipe):
    """Coordinates that a file gives without a decimal point are not cut off when they are scaled."""
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.CROP.ENABLED = recipe == "crop"
    if recipe == "jitter":
        cfg.INPUT.LARGE_SCALE_JITTER.ENABLED = True
        cfg.MODEL.CODETR.CANVAS_SIZE = 410
    add_polygons(record)
    mapped = []
    for kind in (int, float):
        for annotation in record["annotations"]:
            annotation["bbox"] = [kind(x) for x in annotation["bbox"]]
            annotation["segmentation"] = [[kind(x) for x in polygon] for polygon in annotation["segmentation"]]
        np.random.seed(3)
        mapped.append(CoDETRDatasetMapper(cfg, is_train=True)(record)["instances"])
    assert torch.equal(mapped[0].gt_boxes.tensor, mapped[1].gt_boxes.tensor)
    assert (mapped[0].gt_boxes.tensor % 1 != 0).any()
    for first, second in zip(mapped[0].gt_masks.polygons, mapped[1].gt_masks.polygons):
        np.testing.assert_array_equal(first[0], second[0])


@pytest.mark.parametrize("mask_format", ["polygon", "bitmask"])
def test_masks_lie_on_the_pixels_of_their_objects(cfg, record, mask_format):
    """After flip, crop and resize each mask still covers its colour, and its box."""
    add_polygons(record)
    if mask_format == "bitmask":  # one of them as an RLE
        polygon = record["annotations"][1]["segmentation"]
        [record["annotations"][1]["segmentation"]] = mask_util.frPyObjects(polygon, 480, 640)
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.MASK_FORMAT = mask_format
    cfg.INPUT.CROP.ENABLED = True
    mapper = CoDETRDatasetMapper(cfg, is_train=True)
    np.random.seed(0)
    for _ in range(10):
        mapped = mapper(record)
        instances = mapped["instances"]
        masks = instances.gt_masks
        if mask_format == "polygon":
            masks = BitMasks.from_polygon_masks(masks, *instances.image_size)
        edges = masks.get_bounding_boxes().tensor
        np.testing.assert_allclose(instances.gt_boxes.tensor, edges, atol=1.0)
        for mask, label in zip(masks.tensor, instances.gt_classes):
            coloured = mapped["image"][label] > 127
            assert (mask & coloured).sum() > 0.97 * (mask | coloured).sum()


def test_images_without_objects_where_the_model_has_masks(cfg, record):
    """There are masks of no object, in the type that the config says."""
    cfg.MODEL.MASK_ON = True
    cfg.INPUT.CROP.ENABLED = True
    add_polygons(record)
    for annotation in record["annotations"]:
        annotation["iscrowd"] = 1
    for mask_format, annotations in (("polygon", record["annotations"]), ("bitmask", [])):
        cfg.INPUT.MASK_FORMAT = mask_format
        mapped = CoDETRDatasetMapper(cfg, is_train=True)({**record, "annotations": annotations})
        assert len(mapped["instances"].gt_masks) == 0
        assert mapped["instances"].gt_boxes.tensor.shape == (0, 4) and "annotations" not in mapped
        assert mapped["instances"].image_size == tuple(mapped["image"].shape[1:])


@pytest.mark.parametrize("recipe", ["resize", "crop", "jitter", "test"])
@pytest.mark.parametrize("masks", [False, True])
@pytest.mark.parametrize("size", [(6000, 2), (2, 6000), (1, 1)])
def test_thin_pictures_keep_a_pixel(cfg, tmp_path, recipe, masks, size):
    width, height = size
    Image.new("RGB", size).save(tmp_path / "thin.png")
    cfg.MODEL.MASK_ON = masks
    cfg.INPUT.CROP.ENABLED = recipe == "crop"
    cfg.INPUT.LARGE_SCALE_JITTER.ENABLED = recipe == "jitter"
    cfg.MODEL.CODETR.CANVAS_SIZE = 256 if recipe == "jitter" else 0
    polygon = [0, 0, width, 0, width, height, 0, height]
    box = {"bbox": [0, 0, width, height], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0, "segmentation": [polygon]}
    record = {"file_name": str(tmp_path / "thin.png"), "width": width, "height": height, "annotations": [box]}
    mapper = CoDETRDatasetMapper(cfg, recipe != "test")
    for _ in range(5):
        sample = mapper(copy.deepcopy(record))
        assert min(sample["image"].shape) >= 1
        if recipe != "test":
            assert sample["instances"].gt_boxes.tensor.isfinite().all()
