"""What an exported file says of itself."""

import json
import os

from detectron2.config import CfgNode

from .. import __version__

__all__ = ["metadata_of"]


def metadata_of(cfg: CfgNode, class_names: list[str], config_file: str) -> dict[str, str]:
    """Strings by name: what a program needs that runs the file, beside its inputs and outputs.

    ``class_names`` is a JSON list. ``min_size`` and ``max_size`` are the sides in pixels that pictures are resized to
    before (the shorter one, unless the longer one is over ``max_size`` then); ``min_size`` 0 leaves them as they are.
    ``masks`` is the kind of the mask head, or empty.
    """
    return {
        "version": __version__,
        "config": os.path.basename(config_file),
        "weights": os.path.basename(cfg.MODEL.WEIGHTS),
        "class_names": json.dumps(class_names, ensure_ascii=False),
        "min_size": str(cfg.INPUT.MIN_SIZE_TEST),
        "max_size": str(cfg.INPUT.MAX_SIZE_TEST),
        "masks": cfg.MODEL.CODETR.MASK_HEAD if cfg.MODEL.MASK_ON else "",
    }
