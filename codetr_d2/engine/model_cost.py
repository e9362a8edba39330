"""What the model of a run costs at inference, for its log."""

import logging

from detectron2.config import CfgNode
from torch import nn

from ..analysis.flops import detection_flops
from ..modeling.meta_arch import CoDETR

__all__ = ["log_detection_flops"]

logger = logging.getLogger(__name__)


def log_detection_flops(cfg: CfgNode, model: nn.Module) -> None:
    """Log the FLOPs of one image of the largest size that tests have. There is nothing to log for other detectors.

    Where they cannot be counted, the log says so, and nothing else happens.

    Args:
        cfg: ``INPUT`` and ``MODEL.CODETR.CANVAS_SIZE`` tell the size; where images keep theirs it is 800 x 1333 pixels.
        model: of the config; only a CoDETR is counted.
    """
    if not isinstance(model, CoDETR):
        return
    shortest, longest, canvas = cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST, cfg.MODEL.CODETR.CANVAS_SIZE
    height, width = (min(shortest, longest), longest) if shortest > 0 else (800, 1333)
    if canvas > 0:
        height = width = canvas
    try:
        flops = detection_flops(model, (height, width))
    except Exception as error:  # whatever it is, the training can do without
        logger.info("FLOPs are not known: %s", (str(error) or type(error).__name__).splitlines()[0])
        return
    logger.info(
        "%.2f GFLOPs at inference, for one image of %d x %d pixels%s; a multiplication with its addition counts once",
        *(flops / 1e9, height, width, " without its masks" if cfg.MODEL.MASK_ON else ""),
    )
