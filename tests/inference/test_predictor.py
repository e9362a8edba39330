import re

import cv2
import numpy as np
import pytest
import torch
from detectron2.engine import DefaultPredictor
from PIL import Image

from codetr_d2.checkpoint.published import codetr_to_published
from codetr_d2.data import read_image
from codetr_d2.errors import InputError
from codetr_d2.inference import Predictor
from tests.tiny_run import write_tiny_run

pytestmark = pytest.mark.slow

# A backbone that takes pictures of one channel, and that published models have.
RESNET = [
    *("MODEL.BACKBONE.NAME", "build_resnet_backbone", "MODEL.RESNETS.DEPTH", 18, "MODEL.RESNETS.RES2_OUT_CHANNELS", 64),
    *("MODEL.RESNETS.OUT_FEATURES", ["res3", "res4", "res5"], "MODEL.CODETR.IN_FEATURES", ["res3", "res4", "res5"]),
]


def load(folder, *opts):
    cfg = write_tiny_run(folder, opts=opts)
    cfg.MODEL.WEIGHTS = str(folder / "model_final.pth")
    return cfg


@pytest.fixture(scope="module")
def cfg(tmp_path_factory):
    return load(tmp_path_factory.mktemp("run"))


@pytest.fixture(scope="module")
def predictor(cfg):
    return Predictor(cfg)


def noise(*shape):
    return np.random.default_rng(0).integers(0, 256, shape, dtype=np.uint8)


@pytest.mark.parametrize("format", ["RGB", "BGR"])
def test_equals_the_default_predictor(cfg, format):
    cfg = cfg.clone()
    cfg.INPUT.FORMAT = format
    ours, theirs = Predictor(cfg), DefaultPredictor(cfg)
    for size in ((60, 80), (150, 90), (33, 401)):
        found, expected = ours(noise(*size, 3))["instances"], theirs(noise(*size, 3))["instances"]
        assert len(found) == len(expected) > 0 and found.image_size == size
        assert torch.equal(found.pred_boxes.tensor, expected.pred_boxes.tensor)
        assert torch.equal(found.scores, expected.scores)
        assert torch.equal(found.pred_classes, expected.pred_classes)
    assert ours.metadata is theirs.metadata and ours.cfg == theirs.cfg


@pytest.mark.parametrize("size", [(2, 6000), (6000, 2), (1, 1), (1, 300), (300, 1)])
@pytest.mark.parametrize("masks", [False, True])
def test_thin_pictures(cfg, predictor, tmp_path, size, masks):
    if masks:
        predictor = Predictor(load(tmp_path, "MODEL.MASK_ON", True, "MODEL.CODETR.MASK_HEAD", "refine"))
    found = predictor(noise(*size, 3))["instances"]
    assert len(found) > 0 and found.image_size == size
    boxes = found.pred_boxes.tensor
    assert (boxes >= 0).all() and (boxes <= torch.tensor([*size[::-1]] * 2)).all()
    if masks:
        assert found.pred_masks.shape[1:] == size


def test_grey_models_take_colours_and_grey(tmp_path):
    """A model of one channel sees the grey that training reads from the file."""
    options = ["INPUT.FORMAT", "L", "MODEL.PIXEL_MEAN", [127.0], "MODEL.PIXEL_STD", [128.0]]
    predictor = Predictor(load(tmp_path, *RESNET, *options))
    Image.fromarray(noise(60, 80, 3)).save(tmp_path / "x.png")
    grey = read_image(tmp_path / "x.png", "L")
    expected = predictor(grey)["instances"]
    for image in (grey[..., 0], read_image(tmp_path / "x.png", "BGR"), cv2.imread(str(tmp_path / "x.png"))):
        found = predictor(image)["instances"]
        assert torch.equal(found.scores, expected.scores) and len(found) > 0


@pytest.mark.parametrize(
    "image, message",
    [
        (None, "is None, .*cv2.imread"),
        (Image.new("RGB", (8, 8)), "is a Image, .*read a file"),
        (torch.zeros(8, 8, 3), "is a Tensor, "),
        (np.zeros((8, 9, 4), np.uint8), r"is an array \[8, 9, 4\] of uint8, .*COLOR_BGRA2BGR"),
        (np.zeros((8, 9), np.uint8), r"is an array \[8, 9\] of uint8, .*COLOR_GRAY2BGR"),
        (np.zeros((8, 9, 1), np.uint8), "COLOR_GRAY2BGR"),
        (np.zeros((8, 9, 3)), "of float64, .*255"),
        (np.zeros((8, 9, 3), np.uint16), "of uint16, "),
        (np.zeros((3, 8, 9), np.uint8), "transpose"),
        (np.zeros((2, 8, 9, 3), np.uint8), "one picture at a time"),
        (np.zeros((0, 9, 3), np.uint8), "no pixel"),
    ],
)
def test_arrays_that_are_no_bgr_picture(predictor, image, message):
    with pytest.raises(InputError, match=message) as error:
        predictor(image)
    assert r"[H, W, 3] of uint8" in str(error.value) and "\n" not in str(error.value)


def test_the_conversions_that_errors_name(predictor):
    """What each message tells to do gives a picture."""
    converted = [
        cv2.cvtColor(noise(8, 9, 4), cv2.COLOR_BGRA2BGR),
        cv2.cvtColor(noise(8, 9), cv2.COLOR_GRAY2BGR),
        (noise(8, 9, 3) / 255 * 255).round().astype(np.uint8),
        noise(3, 8, 9).transpose(1, 2, 0),
    ]
    for image in converted:
        assert predictor(image)["instances"].image_size == (8, 9)


@pytest.mark.parametrize(
    "part, value", [("backbone.", np.inf), ("class", np.nan), ("box", np.nan), ("", np.nan), ("", 1e30)]
)
def test_outputs_that_are_not_finite(cfg, part, value):
    predictor = Predictor(cfg)
    with torch.no_grad():
        for name, parameter in predictor.model.named_parameters():
            if part in name:
                parameter.fill_(value)
    with pytest.raises(InputError, match=re.escape(cfg.MODEL.WEIGHTS) + ".*not finite"):
        predictor(noise(60, 80, 3))


def test_published_file_as_downloaded(tmp_path):
    cfg = load(tmp_path, *RESNET)
    predictor = Predictor(cfg)
    published = codetr_to_published(predictor.model.state_dict())
    assert "backbone.conv1.weight" in published  # ours is backbone.stem.conv1.weight
    torch.save({"meta": {"epoch": 12}, "state_dict": published, "optimizer": {}}, tmp_path / "published.pth")
    cfg.MODEL.WEIGHTS = str(tmp_path / "published.pth")
    found, expected = Predictor(cfg)(noise(60, 80, 3))["instances"], predictor(noise(60, 80, 3))["instances"]
    assert torch.equal(found.scores, expected.scores) and len(found) > 0


def test_weights_that_cannot_be_loaded(cfg, tmp_path):
    cfg = cfg.clone()
    cfg.MODEL.WEIGHTS = str(tmp_path / "no.pth")
    with pytest.raises(InputError, match="no.pth: no such checkpoint"):
        Predictor(cfg)
