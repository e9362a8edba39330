"""What becomes of every option of detectron2: it is honoured here, or refused where it would have no effect.

An option of a component that the config does not name (of the ResNet, where the backbone is a Swin) counts as honoured:
it waits for its component, and configs inherit such options from each other.
"""

from fnmatch import fnmatchcase

from detectron2.config import CfgNode, get_cfg

from ..errors import InputError
from ..option_checks import option
from .config_file import options_of, plain
from .defaults import add_codetr_config

__all__ = ["HONOURED", "REFUSED", "REFUSED_BY_CODETR", "check_honoured"]

# In the three tables * stands for any end of an option's name. Whole groups are those that detectron2's own components
# read, new options included; elsewhere each option is named, so that a new one has to be decided on.
HONOURED = (
    *("MODEL.MASK_ON", "MODEL.DEVICE", "MODEL.META_ARCHITECTURE", "MODEL.WEIGHTS", "MODEL.PIXEL_MEAN"),
    *("MODEL.PIXEL_STD", "MODEL.BACKBONE.NAME", "MODEL.BACKBONE.FREEZE_AT", "MODEL.RESNETS.*"),
    *("MODEL.FPN.IN_FEATURES", "MODEL.FPN.OUT_CHANNELS", "MODEL.FPN.NORM", "MODEL.FPN.FUSE_TYPE"),
    *(
        "MODEL.PROPOSAL_GENERATOR.*",
        "MODEL.RPN.*",
        "MODEL.ROI_HEADS.*",
        "MODEL.ROI_BOX_HEAD.*",
        "MODEL.ROI_MASK_HEAD.*",
    ),
    *(f"MODEL.RETINANET.{name}" for name in ("NUM_CONVS", "IOU_THRESHOLDS", "IOU_LABELS", "BBOX_REG_WEIGHTS")),
    *(f"MODEL.RETINANET.{name}_TEST" for name in ("SCORE_THRESH", "TOPK_CANDIDATES", "NMS_THRESH")),
    *(f"MODEL.ANCHOR_GENERATOR.{name}" for name in ("NAME", "SIZES", "ASPECT_RATIOS", "OFFSET")),
    *("INPUT.MIN_SIZE_TRAIN", "INPUT.MIN_SIZE_TRAIN_SAMPLING", "INPUT.MAX_SIZE_TRAIN", "INPUT.MIN_SIZE_TEST"),
    *("INPUT.MAX_SIZE_TEST", "INPUT.RANDOM_FLIP", "INPUT.CROP.ENABLED", "INPUT.CROP.TYPE", "INPUT.CROP.SIZE"),
    *("INPUT.FORMAT", "INPUT.MASK_FORMAT", "DATASETS.TRAIN", "DATASETS.TEST"),
    *("DATALOADER.NUM_WORKERS", "DATALOADER.ASPECT_RATIO_GROUPING", "DATALOADER.SAMPLER_TRAIN"),
    *("DATALOADER.REPEAT_THRESHOLD", "DATALOADER.REPEAT_SQRT", "DATALOADER.FILTER_EMPTY_ANNOTATIONS"),
    *("SOLVER.LR_SCHEDULER_NAME", "SOLVER.MAX_ITER", "SOLVER.BASE_LR", "SOLVER.BASE_LR_END", "SOLVER.GAMMA"),
    *("SOLVER.STEPS", "SOLVER.NUM_DECAYS", "SOLVER.RESCALE_INTERVAL", "SOLVER.WARMUP_FACTOR", "SOLVER.WARMUP_ITERS"),
    *("SOLVER.WARMUP_METHOD", "SOLVER.WEIGHT_DECAY", "SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS"),
    *("SOLVER.BIAS_LR_FACTOR", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.IMS_PER_BATCH", "SOLVER.REFERENCE_WORLD_SIZE"),
    *(f"SOLVER.CLIP_GRADIENTS.{name}" for name in ("ENABLED", "CLIP_TYPE", "CLIP_VALUE", "NORM_TYPE")),
    *("SOLVER.AMP.ENABLED", "TEST.EXPECTED_RESULTS", "TEST.EVAL_PERIOD", "TEST.DETECTIONS_PER_IMAGE"),
    *("OUTPUT_DIR", "SEED", "CUDNN_BENCHMARK", "FLOAT32_PRECISION", "VIS_PERIOD"),
)

_NO_PROPOSALS = "proposals come from the model, not from files"
_NO_KEYPOINTS = "there are no keypoints here"
_NO_SEGMENTATION = "datasets here have objects, and no semantic segmentation"
_ADAMW = "the optimizer is AdamW, which has no such option"
# What has no effect with any detector, and why.
REFUSED = {
    "VERSION": "only options under the names of detectron2's version 2 are known; rename those of version 1",
    "MODEL.LOAD_PROPOSALS": _NO_PROPOSALS,
    "DATASETS.PROPOSAL_FILES_*": _NO_PROPOSALS,
    "DATASETS.PRECOMPUTED_PROPOSAL_TOPK_*": _NO_PROPOSALS,
    "MODEL.KEYPOINT_ON": _NO_KEYPOINTS,
    "MODEL.ROI_KEYPOINT_HEAD.*": _NO_KEYPOINTS,
    "TEST.KEYPOINT_OKS_SIGMAS": _NO_KEYPOINTS,
    "MODEL.SEM_SEG_HEAD.*": _NO_SEGMENTATION,
    "MODEL.PANOPTIC_FPN.*": _NO_SEGMENTATION,
    "MODEL.ANCHOR_GENERATOR.ANGLES": "boxes here are upright",
    "SOLVER.MOMENTUM": _ADAMW,
    "SOLVER.NESTEROV": _ADAMW,
    "TEST.AUG.*": "there is no test-time augmentation here",
    "TEST.PRECISE_BN.*": "statistics of batch norm are not computed anew here",
    "GLOBAL.HACK": "nothing reads it",
}

_LEVELS = "CoDETR's heads read the levels of the transformer and what is made of them: see MODEL.CODETR.IN_FEATURES"
_NUM_CLASSES = "CoDETR has its number of classes from MODEL.CODETR.NUM_CLASSES: set that"
_GIOU = "CoDETR's RetinaNet head has a GIoU loss"
_NO_FEDERATED_LOSS = "CoDETR has no federated loss"
# What has no effect with CoDETR, and why; other detectors read it.
REFUSED_BY_CODETR = {
    "MODEL.RPN.IN_FEATURES": _LEVELS,
    "MODEL.ROI_HEADS.IN_FEATURES": _LEVELS,
    "MODEL.ROI_HEADS.NUM_CLASSES": _NUM_CLASSES,
    "MODEL.ROI_BOX_HEAD.USE_FED_LOSS": _NO_FEDERATED_LOSS,
    "MODEL.ROI_BOX_HEAD.FED_LOSS_*": _NO_FEDERATED_LOSS,
    "MODEL.ROI_BOX_CASCADE_HEAD.*": "CoDETR's ROI head, CoROIHeads, has no cascade",
    "MODEL.RETINANET.IN_FEATURES": _LEVELS,
    "MODEL.RETINANET.NUM_CLASSES": _NUM_CLASSES,
    "MODEL.RETINANET.PRIOR_PROB": "CoDETR's RetinaNet head starts from a probability of 0.01",
    "MODEL.RETINANET.FOCAL_LOSS_*": "CoDETR's RetinaNet head has the focal loss of its paper",
    "MODEL.RETINANET.SMOOTH_L1_LOSS_BETA": _GIOU,
    "MODEL.RETINANET.BBOX_REG_LOSS_TYPE": _GIOU,
    "MODEL.RETINANET.NORM": "CoDETR's RetinaNet head has no normalisation",
}


def check_honoured(cfg: CfgNode) -> None:
    """Refuse every option of detectron2 that has been set and has no effect.

    Raises:
        InputError: naming the first such option, why, and the default to leave it at.
    """
    tables = [REFUSED_BY_CODETR, REFUSED] if cfg.MODEL.META_ARCHITECTURE == "CoDETR" else [REFUSED]
    reasons = {pattern: reason for table in tables for pattern, reason in table.items()}
    defaults = get_cfg()
    add_codetr_config(defaults)
    for key, default in options_of(defaults, defaults):
        value = option(cfg, key)
        if plain(value) == plain(default):
            continue
        for pattern, reason in reasons.items():
            if fnmatchcase(key, pattern):
                raise InputError(f"{key} is {value!r}, which has no effect: {reason}. Leave it at {default!r}")
