"""What an exported file says of itself."""

import json
import os

from detectron2.config import CfgNode

from .. import __version__

__all__ = ["metadata_of"]

MASK_THRESHOLD = 0.5  # what detectron2 pastes masks into pictures with


def metadata_of(cfg: CfgNode, class_names: list[str], config_file: str, postprocess: str = "top-k") -> dict[str, str]:
    """Strings by name: what a program needs that runs the file, beside its inputs and outputs.

    ``class_names`` is a JSON list. ``min_size`` and ``max_size`` are the sides in pixels that pictures are resized to
    before (the shorter one, unless the longer one is over ``max_size`` then); ``min_size`` 0 leaves them as they are.
    ``max_detections`` are found at most in a picture, whatever their scores. ``soft_nms_threshold`` is the overlap from
    which on boxes of a class lower each other's scores, 0 without soft-NMS. ``masks`` is the kind of the mask head, and
    ``mask_threshold`` the probability from which on a pixel belongs to the object; both are empty without masks.

    Args:
        cfg: of the model.
        class_names: of its classes, or empty.
        config_file: its name alone is told.
        postprocess: ``top-k``, ``soft-nms`` or ``none``, what follows the decoder in the file.
    """
    return {
        "version": __version__,
        "config": os.path.basename(config_file),
        "weights": os.path.basename(cfg.MODEL.WEIGHTS),
        "class_names": json.dumps(class_names, ensure_ascii=False),
        "min_size": str(cfg.INPUT.MIN_SIZE_TEST),
        "max_size": str(cfg.INPUT.MAX_SIZE_TEST),
        "max_detections": "" if postprocess == "none" else str(cfg.TEST.DETECTIONS_PER_IMAGE),
        "soft_nms_threshold": str(cfg.MODEL.CODETR.SOFT_NMS_THRESH if postprocess == "soft-nms" else 0.0),
        "mask_threshold": str(MASK_THRESHOLD) if cfg.MODEL.MASK_ON else "",
        "masks": cfg.MODEL.CODETR.MASK_HEAD if cfg.MODEL.MASK_ON else "",
    }
