"""What an exported file says of itself."""

import json

from detectron2.config import get_cfg

from codetr_d2 import __version__, add_codetr_config
from codetr_d2.export.metadata import metadata_of


def test_sizes_and_thresholds_of_the_config():
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.MODEL.WEIGHTS, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST = "/runs/mine/model_final.pth", 480, 640
    cfg.TEST.DETECTIONS_PER_IMAGE, cfg.MODEL.CODETR.SOFT_NMS_THRESH = 300, 0.8
    found = metadata_of(cfg, ["Bär", "cat"], "/runs/mine/config.yaml", "soft-nms")
    assert json.loads(found.pop("class_names")) == ["Bär", "cat"]
    assert found == {
        "version": __version__,
        "config": "config.yaml",
        "weights": "model_final.pth",
        "min_size": "480",
        "max_size": "640",
        "max_detections": "300",
        "soft_nms_threshold": "0.8",
        "masks": "",
        "mask_threshold": "",
    }
    # The file has no soft-NMS then, whatever the config says.
    assert metadata_of(cfg, [], "config.yaml", "top-k")["soft_nms_threshold"] == "0.0"
    assert metadata_of(cfg, [], "config.yaml", "none")["max_detections"] == ""
    cfg.MODEL.MASK_ON, cfg.MODEL.CODETR.MASK_HEAD = True, "refine"
    found = metadata_of(cfg, [], "config.yaml")
    assert (found["masks"], found["mask_threshold"]) == ("refine", "0.5")
