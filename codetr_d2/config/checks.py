"""What is checked of a config before any long work starts.

Here stands what concerns no component of the model; components check their own options, see
:mod:`codetr_d2.modeling.facts`.
"""

import importlib.util
import math
import os

from detectron2.config import CfgNode
from detectron2.data import DatasetCatalog
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_HEADS_REGISTRY,
)

from ..data.datasets import register_datasets
from ..data.loader import TRAIN_SAMPLERS
from ..errors import InputError
from ..modeling.facts import check_options
from ..option_checks import divisible, one_of, option, positive, within
from .config_file import resolve_device
from .honoured import check_honoured

__all__ = ["check_config"]

# Names in these registries that ask for turned boxes or for semantic segmentation, which datasets here don't have.
_UNSUITABLE = ("RotatedAnchorGenerator", "RRPN", "RROIHeads", "PanopticFPN", "SemanticSegmentor")

# Options that name a component, and where it is registered; CoDETR looks after those of its own heads.
_REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
}


def check_config(cfg: CfgNode, num_processes: int = 1, resume: bool = False, eval_only: bool = False) -> None:
    """Check the values of options against each other and against what there is.

    Args:
        cfg: the config.
        num_processes: in all, over all machines.
        resume: the run will go on from its checkpoint, if there is one.
        eval_only: nothing is trained, so that the options of the training don't matter.

    Raises:
        InputError: naming the option and what it may be.
    """
    solver = cfg.SOLVER
    for key, registry in _REGISTRIES.items():
        one_of(cfg, key, [name for name, _ in registry if name not in _UNSUITABLE])
    check_honoured(cfg)
    for key, registry in _REGISTRIES.items():
        check_options(registry.get(option(cfg, key)), cfg)
    backbone = cfg.MODEL.BACKBONE.NAME
    if backbone.endswith("_fpn_backbone") and not cfg.MODEL.FPN.IN_FEATURES:
        raise InputError(f"MODEL.FPN.IN_FEATURES is empty; {backbone} needs the names of the features below its FPN")
    one_of(cfg, "INPUT.FORMAT", ["RGB", "BGR", "L", "YUV-BT.601"])
    mean, std = cfg.MODEL.PIXEL_MEAN, cfg.MODEL.PIXEL_STD
    channels = {1, 3} if cfg.INPUT.FORMAT == "L" else {3}  # grey values are repeated for a backbone of three channels
    if len(mean) not in channels or len(std) != len(mean):
        raise InputError(
            f"MODEL.PIXEL_MEAN is {mean} and MODEL.PIXEL_STD is {std}; INPUT.FORMAT {cfg.INPUT.FORMAT} needs "
            f"{' or '.join(map(str, channels))} entries in both"
        )
    if getattr(cfg, "FLOAT32_PRECISION", ""):  # not every detectron2 has it
        one_of(cfg, "FLOAT32_PRECISION", ["highest", "high", "medium"])
    within(cfg, 0, math.inf, "INPUT.MIN_SIZE_TEST")  # 0: images keep their size
    positive(cfg, "INPUT.MAX_SIZE_TEST")
    if cfg.INPUT.MIN_SIZE_TEST > 0:
        _check_canvas(cfg, "INPUT.MAX_SIZE_TEST")
    if cfg.MODEL.MASK_ON or not eval_only:
        one_of(cfg, "INPUT.MASK_FORMAT", ["polygon", "bitmask"])
    if cfg.DATALOADER.NUM_WORKERS < 0:
        raise InputError(f"DATALOADER.NUM_WORKERS is {cfg.DATALOADER.NUM_WORKERS}; it must be 0 (no workers) or more")
    positive(cfg, "TEST.DETECTIONS_PER_IMAGE")
    within(cfg, 0, math.inf, "MODEL.BACKBONE.FREEZE_AT", "TEST.STABILITY_IMAGES")
    if cfg.TEST.STABILITY_IMAGES and not eval_only and not (cfg.TEST.EVAL_PERIOD > 0 and cfg.DATASETS.TEST):
        raise InputError(
            f"TEST.STABILITY_IMAGES is {cfg.TEST.STABILITY_IMAGES}, but the matching is written at each evaluation: "
            "set TEST.EVAL_PERIOD to the iterations of an epoch, and name a dataset in DATASETS.TEST"
        )
    _check_early_stopping(cfg, eval_only)
    if solver.AMP.ENABLED:
        one_of(cfg, "SOLVER.AMP.DTYPE", ["bfloat16"] if resolve_device(cfg) == "cpu" else ["bfloat16", "float16"])

    _check_datasets(cfg, eval_only)

    weights = cfg.MODEL.WEIGHTS.split("?")[0]  # detectron2 reads options after a question mark
    resumes = resume and os.path.isfile(os.path.join(cfg.OUTPUT_DIR, "last_checkpoint"))
    if weights and "://" not in weights and not resumes and not os.path.isfile(weights):
        raise InputError(
            f"MODEL.WEIGHTS: there is no file {weights}; put it there, name another file, or start from random weights "
            "with MODEL.WEIGHTS ''"
        )
    if eval_only:
        if not weights and not resumes:
            where = f"; there is no checkpoint in OUTPUT_DIR ({cfg.OUTPUT_DIR})" if resume else ", or --resume"
            raise InputError(f"--eval-only needs the weights to evaluate: MODEL.WEIGHTS path/to/model_final.pth{where}")
        return

    positive(cfg, "SOLVER.IMS_PER_BATCH", "SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.ACCUMULATE_STEPS")
    positive(cfg, "SOLVER.BASE_LR")
    if not 0 < solver.LAYER_DECAY <= 1:
        raise InputError(f"SOLVER.LAYER_DECAY is {solver.LAYER_DECAY}; it must be greater than 0 and at most 1")
    if solver.LAYER_DECAY < 1 and not hasattr(BACKBONE_REGISTRY.get(backbone), "DEPTH_OPTION"):
        suitable = ", ".join(name for name, builder in BACKBONE_REGISTRY if hasattr(builder, "DEPTH_OPTION"))
        raise InputError(
            f"SOLVER.LAYER_DECAY is {solver.LAYER_DECAY}, but MODEL.BACKBONE.NAME {backbone} has no ViT blocks; set "
            f"1.0, or take {suitable}"
        )
    share = num_processes * solver.ACCUMULATE_STEPS
    divisible(
        "SOLVER.IMS_PER_BATCH", solver.IMS_PER_BATCH, share, "the number of processes times SOLVER.ACCUMULATE_STEPS"
    )
    within(cfg, 0, math.inf, "SOLVER.WEIGHT_DECAY", "SOLVER.BIAS_LR_FACTOR", "SOLVER.REFERENCE_BATCH_SIZE")
    if solver.REFERENCE_BATCH_SIZE and solver.REFERENCE_WORLD_SIZE:
        raise InputError(
            f"SOLVER.REFERENCE_BATCH_SIZE is {solver.REFERENCE_BATCH_SIZE} and SOLVER.REFERENCE_WORLD_SIZE is "
            f"{solver.REFERENCE_WORLD_SIZE}; each scales the learning rate with the batch, so set one of them to 0"
        )
    for key in ("SOLVER.WEIGHT_DECAY_NORM", "SOLVER.WEIGHT_DECAY_BIAS"):
        decay = option(cfg, key)
        if not (decay is None or isinstance(decay, (int, float)) and decay >= 0):
            raise InputError(f"{key} is {decay!r}; it must be at least 0, or None for that of SOLVER.WEIGHT_DECAY")
    if solver.LR_SCHEDULER_NAME == "WarmupCosineLR":
        within(cfg, 0, solver.BASE_LR, "SOLVER.BASE_LR_END")
    one_of(cfg, "SOLVER.LR_SCHEDULER_NAME", ["WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"])
    one_of(cfg, "SOLVER.WARMUP_METHOD", ["linear", "constant"])
    one_of(cfg, "SOLVER.CLIP_GRADIENTS.CLIP_TYPE", ["full_model", "norm", "value"])
    one_of(cfg, "DATALOADER.SAMPLER_TRAIN", TRAIN_SAMPLERS)
    one_of(cfg, "INPUT.RANDOM_FLIP", ["none", "horizontal", "vertical"])
    _check_train_sizes(cfg)
    one_of(cfg, "INPUT.CROP.TYPE", ["relative_range", "relative", "absolute", "absolute_range"])
    _check_crop(cfg)
    _check_jitter(cfg)
    _check_writers(cfg)
    if solver.EMA.ENABLED and not 0 < solver.EMA.DECAY < 1:
        raise InputError(f"SOLVER.EMA.DECAY is {solver.EMA.DECAY}; it must lie between 0 and 1")
    for entry in solver.LR_MULTIPLIERS:
        if not (
            isinstance(entry, (list, tuple))
            and len(entry) == 2
            and isinstance(entry[0], str)
            and isinstance(entry[1], (int, float))
        ):
            raise InputError(
                f"SOLVER.LR_MULTIPLIERS has the entry {entry!r}; an entry is [part of a name, factor], "
                "like ['backbone', 0.1]"
            )
    for key in ("SOLVER.STEPS", "SOLVER.STEPS_EPOCHS"):
        steps = option(cfg, key)
        if any(a >= b for a, b in zip(steps, steps[1:])):
            raise InputError(f"{key} is {steps}; it must rise from entry to entry")
    if solver.MAX_EPOCHS <= 0 and solver.MAX_ITER in solver.STEPS:
        raise InputError(f"SOLVER.STEPS is {solver.STEPS}; its entries must not be SOLVER.MAX_ITER ({solver.MAX_ITER})")


def _check_writers(cfg: CfgNode) -> None:
    """The writers are known, their packages installed, and there is one for the pictures of the training."""
    one_of(cfg, "SOLVER.WRITERS", ["json", "tensorboard", "wandb", "mlflow"])
    for name in cfg.SOLVER.WRITERS:
        if name != "json" and not _is_installed(name):
            raise InputError(
                f"SOLVER.WRITERS has {name!r}, but the package {name} is not installed: run `python -m pip install "
                f"{name}`, or take {name!r} out of the list"
            )
    within(cfg, 0, math.inf, "VIS_PERIOD")
    if cfg.VIS_PERIOD and "tensorboard" not in cfg.SOLVER.WRITERS:
        raise InputError(
            f"VIS_PERIOD is {cfg.VIS_PERIOD}, but its pictures are for TensorBoard: add 'tensorboard' to "
            "SOLVER.WRITERS, or set it to 0"
        )


def _is_installed(package: str) -> bool:
    """Whether a package can be imported. A mere folder of its name, as W&B leaves behind, is none and has no origin."""
    spec = importlib.util.find_spec(package)
    return spec is not None and spec.origin is not None


def _check_early_stopping(cfg: CfgNode, eval_only: bool) -> None:
    """Early stopping has evaluations to judge by."""
    within(cfg, 0, math.inf, "TEST.EARLY_STOPPING_PATIENCE")
    has_evaluations = cfg.TEST.EVAL_PERIOD > 0 and cfg.DATASETS.TEST and cfg.TEST.BEST_CHECKPOINT_METRIC
    if cfg.TEST.EARLY_STOPPING_PATIENCE and not eval_only and not has_evaluations:
        raise InputError(
            f"TEST.EARLY_STOPPING_PATIENCE is {cfg.TEST.EARLY_STOPPING_PATIENCE}, but nothing tells whether the model "
            "still gets better: set TEST.EVAL_PERIOD to the iterations between evaluations, name a dataset in "
            "DATASETS.TEST, and in TEST.BEST_CHECKPOINT_METRIC the value that is to rise, like bbox/AP"
        )


def _check_canvas(cfg: CfgNode, key: str) -> None:
    """Images that are resized to the longest side that ``key`` allows fit on the canvas, if there is one."""
    canvas = cfg.MODEL.CODETR.CANVAS_SIZE
    if cfg.MODEL.META_ARCHITECTURE == "CoDETR" and 0 < canvas < option(cfg, key):
        raise InputError(
            f"{key} is {option(cfg, key)}; images must fit on the square of MODEL.CODETR.CANVAS_SIZE ({canvas}): set "
            "it to that"
        )


def _check_train_sizes(cfg: CfgNode) -> None:
    """Check the resizing of the training, by the checks of :func:`check_config`."""
    sizes, sampling = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    if not (sizes and all(isinstance(x, int) and x >= 0 for x in sizes)):
        raise InputError(
            f"INPUT.MIN_SIZE_TRAIN is {sizes}; it must be a list of whole numbers of pixels, like [480, 512]"
        )
    positive(cfg, "INPUT.MAX_SIZE_TRAIN")
    one_of(cfg, "INPUT.MIN_SIZE_TRAIN_SAMPLING", ["choice", "range"])
    if sampling == "range" and len(sizes) != 2:
        raise InputError(
            f"INPUT.MIN_SIZE_TRAIN is {sizes}; with INPUT.MIN_SIZE_TRAIN_SAMPLING range it must be the least and the "
            "largest size"
        )
    if max(sizes) > 0 and not cfg.INPUT.LARGE_SCALE_JITTER.ENABLED:
        _check_canvas(cfg, "INPUT.MAX_SIZE_TRAIN")


def _check_crop(cfg: CfgNode) -> None:
    kind, size = cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE
    if not cfg.INPUT.CROP.ENABLED:
        return
    if kind.startswith("relative"):
        is_valid, needed = all(0 < x <= 1 for x in size), "shares of height and width, greater than 0 and at most 1"
    elif kind == "absolute":
        is_valid, needed = all(isinstance(x, int) and x > 0 for x in size), "a height and a width in whole pixels"
    else:
        is_valid = all(isinstance(x, int) and x > 0 for x in size) and size[0] <= size[-1]
        needed = "the least and the largest side in whole pixels"
    if len(size) != 2 or not is_valid:
        raise InputError(f"INPUT.CROP.SIZE is {size}; with INPUT.CROP.TYPE {kind} it must be two numbers: {needed}")


def _check_jitter(cfg: CfgNode) -> None:
    jitter, copy_paste = cfg.INPUT.LARGE_SCALE_JITTER, cfg.INPUT.COPY_PASTE
    if jitter.ENABLED:
        if not 0 < jitter.MIN_SCALE <= jitter.MAX_SCALE:
            raise InputError(
                f"INPUT.LARGE_SCALE_JITTER.MIN_SCALE is {jitter.MIN_SCALE} and MAX_SCALE is {jitter.MAX_SCALE}; they "
                "must be greater than 0, and MIN_SCALE at most MAX_SCALE"
            )
        if cfg.MODEL.CODETR.CANVAS_SIZE <= 0:
            raise InputError(
                "INPUT.LARGE_SCALE_JITTER.ENABLED needs the side of its square: set MODEL.CODETR.CANVAS_SIZE, to 1024 "
                "for instance"
            )
        if cfg.INPUT.CROP.ENABLED:
            raise InputError("INPUT.CROP.ENABLED and INPUT.LARGE_SCALE_JITTER.ENABLED exclude each other; choose one")
    if copy_paste.ENABLED:
        if not jitter.ENABLED:
            raise InputError(
                "INPUT.COPY_PASTE.ENABLED needs images of one size: set INPUT.LARGE_SCALE_JITTER.ENABLED True"
            )
        if copy_paste.MAX_NUM_PASTED < 1:
            raise InputError(f"INPUT.COPY_PASTE.MAX_NUM_PASTED is {copy_paste.MAX_NUM_PASTED}; it must be 1 or more")


def _check_datasets(cfg: CfgNode, eval_only: bool) -> None:
    """Register the datasets of the config, and see that the ones it uses are known."""
    register_datasets(cfg)
    needed = "DATASETS.TEST" if eval_only else "DATASETS.TRAIN"
    if not option(cfg, needed):
        raise InputError(f"{needed} is empty; name a dataset there, one of DATASETS.COCO_JSON or of detectron2's own")
    described = ", ".join(name for name, _, _ in cfg.DATASETS.COCO_JSON) or "none"
    for key in dict.fromkeys((needed, "DATASETS.TEST")):
        for name in option(cfg, key):
            if name not in DatasetCatalog:
                raise InputError(
                    f"{key} has {name!r}, which is not registered. DATASETS.COCO_JSON describes {described}: add the "
                    "[name, image folder, annotation json] of yours, or take one of detectron2's, like coco_2017_train"
                )
