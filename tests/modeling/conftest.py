"""What the tests of the auxiliary heads share: the published config made small, pyramids and targets."""

import math
from pathlib import Path

import pytest
import torch
from detectron2.config import get_cfg
from detectron2.layers import ShapeSpec
from detectron2.structures import Boxes, Instances

from codetr_d2.config import add_codetr_config
from codetr_d2.modeling.pyramid import FeaturePyramid, Geometry

ROOT = Path(__file__).parents[2]
STRIDES = [8, 16, 32, 64, 128]


@pytest.fixture
def cfg():
    """The published Co-Deformable-DETR config, with 3 classes and a narrow box head."""
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.merge_from_file(str(ROOT / "configs" / "_base_" / "co_deformable_detr.yaml"))
    cfg.MODEL.CODETR.NUM_CLASSES = 3
    cfg.MODEL.ROI_BOX_HEAD.FC_DIM = 32
    return cfg


@pytest.fixture
def input_shapes():
    return [ShapeSpec(channels=16, stride=stride) for stride in STRIDES]


@pytest.fixture
def make_pyramid():
    """A function that makes a pyramid of random features for images padded to one canvas."""

    def make(image_sizes, canvas=None, channels=16, seed=0):
        generator = torch.Generator().manual_seed(seed)
        canvas = canvas or tuple(max(x) for x in zip(*image_sizes))
        shapes = [(math.ceil(canvas[0] / s), math.ceil(canvas[1] / s)) for s in STRIDES]
        maps = [torch.randn(len(image_sizes), channels, h, w, generator=generator) for h, w in shapes]

        def padding(axis):  # cells that an image does not reach at all
            sizes = torch.tensor(image_sizes)[:, axis, None]
            return [torch.arange(x[axis]) >= (sizes / s).ceil() for s, x in zip(STRIDES, shapes)]

        geometry = Geometry(shapes, STRIDES, image_sizes, canvas, image_sizes, padding(0), padding(1))
        return FeaturePyramid(torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1), geometry)

    return make


@pytest.fixture
def make_targets():
    """A function that makes an image's targets from its boxes and classes."""

    def make(image_size, boxes, classes):
        targets = Instances(image_size)
        targets.gt_boxes = Boxes(torch.tensor(boxes, dtype=torch.float32).reshape(-1, 4))
        targets.gt_classes = torch.tensor(classes, dtype=torch.int64)
        return targets

    return make
