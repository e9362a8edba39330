import logging

import pytest
from detectron2.config import get_cfg
from detectron2.modeling import build_model
from detectron2.structures import BoxMode

from codetr_d2 import add_codetr_config
from codetr_d2.engine.anchor_check import warn_of_unsuitable_anchors
from tests.tiny_run import CONFIGS

HEADS = ["atss", "roi", "paa", "retinanet", "fcos", "gfl"]
SCALES = {f"MODEL.{x}.ANCHOR_SCALE": 0.01 for x in ("ATSS", "PAA", "RETINANET", "GFL")}


def config(*opts, aux_heads=HEADS):
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.merge_from_file(str(CONFIGS / "quick_start" / "co_deformable_detr_efficientnet_lite0_digits.yaml"))
    cfg.merge_from_list(["MODEL.CODETR.AUX_HEADS", aux_heads, *opts])
    return cfg


def record(*sides, size=128, iscrowd=0):
    """An image of ``size`` pixels with square objects."""
    objects = [{"bbox": [0, 0, s, s], "bbox_mode": BoxMode.XYWH_ABS, "iscrowd": iscrowd} for s in sides]
    return {"height": size, "width": size, "annotations": objects}


def warnings(cfg, records, caplog):
    model = build_model(cfg)
    with caplog.at_level(logging.WARNING, "codetr_d2"):
        warn_of_unsuitable_anchors(cfg, model, records)
    return [x.getMessage() for x in caplog.records]


def test_one_object_that_anchors_fit_is_enough(caplog):
    assert warnings(config(), [record(1), record(1, 30)], caplog) == []


def test_each_option_is_named_once(caplog):
    """FCOS has no anchors, two heads may share theirs, and crowds are no objects."""
    opts = [x for pair in SCALES.items() for x in pair]
    opts += ["MODEL.ANCHOR_GENERATOR.SIZES", [[1000.0]]]
    messages = warnings(
        config(*opts, aux_heads=[*HEADS, "atss"]), [record(10), record(20, 40), record(1, iscrowd=1)], caplog
    )
    assert {x.partition(":")[0] for x in messages} == {*SCALES, "MODEL.ANCHOR_GENERATOR.SIZES"}
    assert len(messages) == 5
    [atss] = (x for x in messages if "ATSS" in x)
    assert "any of the 3 objects" in atss and "sides of 10 to 40 pixels, the anchors 0 to 1" in atss


@pytest.mark.parametrize(
    "side, fits",
    [
        (20, True),  # 16 and 32 pixels are the anchors of the finest levels
        (51, True),  # IoU with the smallest: 256 / 2601
        (2, False),  # 4 / 256
        (6, True),  # 36 / 256
    ],
)
def test_overlap_with_the_same_centre(side, fits, caplog):
    cfg = config("MODEL.ATSS.ANCHOR_SCALE", 2.0, aux_heads=["atss"])
    assert (warnings(cfg, [record(side)], caplog) == []) == fits


def test_objects_are_scaled_as_in_training(caplog):
    """128 pixels become 1280, and 2 pixels 20."""
    cfg = config("MODEL.ATSS.ANCHOR_SCALE", 2.0, aux_heads=["atss"])
    cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MAX_SIZE_TRAIN = (1270, 1280, 1290), 1280
    assert warnings(cfg, [record(2)], caplog) == []


def test_nothing_to_look_at(caplog):
    cfg = config("MODEL.ATSS.ANCHOR_SCALE", 0.01)
    without_size = record(20)
    del without_size["width"]
    assert warnings(cfg, [{"height": 5, "width": 5, "annotations": []}, without_size], caplog) == []
