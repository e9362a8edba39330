"""Reading configs and checking them, before any long work starts."""

import difflib
import math
import os
import re
from collections.abc import Callable, Iterator, Sequence

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.data import DatasetCatalog
from detectron2.modeling import (
    ANCHOR_GENERATOR_REGISTRY,
    BACKBONE_REGISTRY,
    META_ARCH_REGISTRY,
    PROPOSAL_GENERATOR_REGISTRY,
    ROI_BOX_HEAD_REGISTRY,
    ROI_HEADS_REGISTRY,
    ROI_MASK_HEAD_REGISTRY,
)

from ..checkpoint.checkpointer import atomic_write
from ..data.datasets import register_datasets
from ..data.loader import TRAIN_SAMPLERS
from ..errors import InputError
from ..modeling.auxiliary import AUX_HEAD_REGISTRY, auxiliary_head_names
from ..modeling.query_heads import QUERY_HEAD_REGISTRY
from .defaults import add_codetr_config

__all__ = ["check_config", "check_output_dir", "load_config", "resolve_device", "save_config"]

# Options of the model that may change when a run is resumed: they change neither its weights nor what they mean.
_FREE_TO_CHANGE = {
    "MODEL.WEIGHTS",
    "MODEL.DEVICE",
    "MODEL.MS_DEFORM_ATTN",
    "MODEL.CODETR.ACTIVATION_CHECKPOINTING",
    "MODEL.CODETR.CLASS_NAMES",
    "MODEL.CODETR.COMPILE",
    "MODEL.CODETR.EVAL_HEAD",
    "MODEL.CODETR.INFERENCE_DTYPE",
    "MODEL.EVA02.ACTIVATION_CHECKPOINTING",
    "MODEL.RESNETS.ACTIVATION_CHECKPOINTING",
    "MODEL.SWIN.ACTIVATION_CHECKPOINTING",
    "MODEL.TIMM.ACTIVATION_CHECKPOINTING",
    "MODEL.CODETR.REUSE_CLASSES",
    "MODEL.TIMM.PRETRAINED",
}

# Options that name a component, and where it is registered.
_REGISTRIES = {
    "MODEL.META_ARCHITECTURE": META_ARCH_REGISTRY,
    "MODEL.BACKBONE.NAME": BACKBONE_REGISTRY,
    "MODEL.CODETR.QUERY_HEAD": QUERY_HEAD_REGISTRY,
    "MODEL.CODETR.AUX_HEADS": AUX_HEAD_REGISTRY,
    "MODEL.PROPOSAL_GENERATOR.NAME": PROPOSAL_GENERATOR_REGISTRY,
    "MODEL.ANCHOR_GENERATOR.NAME": ANCHOR_GENERATOR_REGISTRY,
    "MODEL.ROI_HEADS.NAME": ROI_HEADS_REGISTRY,
}


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Read a config file, the files that its ``_BASE_`` names, and options of the command line, in detectron2's format.

    Args:
        config_file: a YAML file.
        opts: key, value, key, value, ...

    Raises:
        InputError: a file is missing or malformed, an option is unknown, or its value has the wrong type.
    """
    cfg = get_cfg()
    add_codetr_config(cfg)
    _merge_file(cfg, config_file, ())
    for key in opts[::2]:
        if key.startswith("-"):
            raise InputError(f"{key}: flags must stand before the KEY VALUE pairs of the command line")
    if len(opts) % 2:
        raise InputError(f"the command line's options must be KEY VALUE pairs, but {opts[-1]} has no value")
    for key, value in zip(opts[::2], opts[1::2]):
        _set(cfg, key, value, "command line")
    return cfg


def _merge_file(cfg: CfgNode, path: str, parents: tuple[str, ...]) -> None:
    origin = f" (_BASE_ of {parents[-1]})" if parents else ""
    if os.path.realpath(path) in map(os.path.realpath, parents):
        raise InputError(f"{path}: its _BASE_ leads back to itself")
    try:
        with open(path, encoding="utf-8") as file:
            loaded = yaml.safe_load(file) or {}
    except OSError as error:
        raise InputError(f"{path}: cannot read this config file{origin}: {error.strerror}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: a config must be a mapping of options, not a {type(loaded).__name__}")
    bases = loaded.pop("_BASE_", [])
    for base in [bases] if isinstance(bases, str) else bases:
        base = os.path.join(os.path.dirname(path), os.path.expanduser(base))
        _merge_file(cfg, base, (*parents, path))
    for key, value in _flatten(loaded, cfg):
        _set(cfg, key, value, path)


def _flatten(tree: dict, like: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The options of nested dicts by their full keys, as deep as ``like`` goes."""
    for name, value in tree.items():
        section = like.get(name) if isinstance(like, dict) else None
        if isinstance(value, dict) and (isinstance(section, dict) or section is None):
            yield from _flatten(value, section, f"{prefix}{name}.")
        elif not (value is None and isinstance(section, dict)):  # an empty section
            yield f"{prefix}{name}", value


def _set(cfg: CfgNode, key: str, value: object, source: str) -> None:
    current = cfg
    for part in key.split("."):
        if not isinstance(current, CfgNode) or part not in current:
            known = [name for name, _ in _flatten(cfg, cfg)]
            close = difflib.get_close_matches(key, known, 1, 0.5)
            raise InputError(f"{source}: unknown option {key}" + (f"; did you mean {close[0]}?" if close else ""))
        current = current[part]
    if isinstance(current, CfgNode):
        raise InputError(f"{source}: {key} is a section; set one of its options: {', '.join(current)}")
    if isinstance(current, float) and isinstance(value, (int, str)) and not isinstance(value, bool):
        try:
            value = float(value)
        except ValueError:
            pass  # a wrong type, reported below
    try:
        cfg.merge_from_list([key, value])
    except (ValueError, KeyError, AssertionError):
        raise InputError(
            f"{source}: {key} must be a {type(current).__name__}, like {current!r}; got {value!r}"
        ) from None


def resolve_device(cfg: CfgNode) -> str:
    """``MODEL.DEVICE``, or "cpu" where that is a GPU and there is none."""
    try:
        kind = torch.device(cfg.MODEL.DEVICE).type
    except RuntimeError:
        raise InputError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}; it may be cpu or cuda") from None
    return "cpu" if kind == "cuda" and not torch.cuda.is_available() else cfg.MODEL.DEVICE


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

    def one_of(key: str, allowed: Sequence[str]) -> None:
        value = _get(cfg, key)
        for item in value if isinstance(value, (list, tuple)) else [value]:
            if item not in allowed:
                raise InputError(f"{key} is {item!r}; it may be: {', '.join(map(str, allowed))}")

    def positive(*keys: str) -> None:
        for key in keys:
            if _get(cfg, key) <= 0:
                raise InputError(f"{key} is {_get(cfg, key)}; it must be greater than 0")

    def within(low: float, high: float, *keys: str) -> None:
        for key in keys:
            if not low <= _get(cfg, key) <= high:
                limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
                raise InputError(f"{key} is {_get(cfg, key)}; it must be {limits}")

    def divisible(key: str, value: int, by: int, what: str) -> None:
        if value % by:
            raise InputError(f"{key} is {value}, which {what} ({by}) does not divide")

    solver, model = cfg.SOLVER, cfg.MODEL.CODETR
    for key, registry in _REGISTRIES.items():
        one_of(key, [name for name, _ in registry])
    if cfg.MODEL.META_ARCHITECTURE == "CoDETR":
        if "roi" in model.AUX_HEADS:
            one_of("MODEL.ROI_BOX_HEAD.NAME", [name for name, _ in ROI_BOX_HEAD_REGISTRY])  # "" by default
        if features := _backbone_features(cfg):
            one_of("MODEL.CODETR.IN_FEATURES", features)
        if not 0 < len(model.IN_FEATURES) <= model.NUM_FEATURE_LEVELS:
            raise InputError(
                f"MODEL.CODETR.IN_FEATURES names {len(model.IN_FEATURES)} features; it must be at least one, and at "
                f"most MODEL.CODETR.NUM_FEATURE_LEVELS ({model.NUM_FEATURE_LEVELS})"
            )
        one_of("MODEL.CODETR.NECK", ["ChannelMapper", ""])
        one_of("MODEL.CODETR.INFERENCE_DTYPE", ["float32", "bfloat16"])
        one_of("MODEL.CODETR.EVAL_HEAD", ["detr", *auxiliary_head_names(model.AUX_HEADS)])
        if cfg.MODEL.MASK_ON:
            one_of("MODEL.CODETR.MASK_HEAD", ["roi", "refine"])
            one_of("INPUT.MASK_FORMAT", ["polygon", "bitmask"])
            if model.MASK_HEAD == "roi" and "roi" not in model.AUX_HEADS:
                raise InputError(
                    'MODEL.CODETR.MASK_HEAD is "roi", which is a branch of the ROI auxiliary head: add "roi" to '
                    'MODEL.CODETR.AUX_HEADS, or choose the mask head "refine"'
                )
            if model.MASK_HEAD == "roi":
                one_of("MODEL.ROI_MASK_HEAD.NAME", [name for name, _ in ROI_MASK_HEAD_REGISTRY])
            positive("MODEL.REFINE_MASK_HEAD.POSITIVES_PER_IMAGE")
        if cfg.MODEL.KEYPOINT_ON:
            raise InputError("MODEL.KEYPOINT_ON is True, but Co-DETR has no keypoints; set it to False")
        one_of("MODEL.CODETR.POSITIVE_QUERIES.PADDING", ["negatives", "mask"])
        one_of("MODEL.MS_DEFORM_ATTN", ["auto", "cpp", "triton", "eager"])
        positive(*(f"MODEL.CODETR.{x}" for x in ("NUM_CLASSES", "NUM_QUERIES", "EMBED_DIM", "SIZE_DIVISIBILITY")))
        positive(*(f"MODEL.CODETR.POSITIVE_QUERIES.{x}" for x in ("MAX_PER_HEAD", "MIN_PER_HEAD")))
        for part in ("ENCODER", "DECODER"):
            positive(*(f"MODEL.CODETR.{part}.{x}" for x in ("NUM_LAYERS", "NUM_HEADS", "NUM_POINTS", "FFN_DIM")))
            what = f"MODEL.CODETR.{part}.NUM_HEADS"
            divisible("MODEL.CODETR.EMBED_DIM", model.EMBED_DIM, _get(cfg, what), what)
            within(0, 1, f"MODEL.CODETR.{part}.DROPOUT")
        divisible("MODEL.CODETR.EMBED_DIM", model.EMBED_DIM, 4, "the sine and cosine of two coordinates")
        within(0, math.inf, *(f"MODEL.CODETR.{x}" for x in ("LAMBDA1", "LAMBDA2", "CANVAS_SIZE")))
        within(0, math.inf, *(f"MODEL.CODETR.DENOISING.{x}" for x in ("NUM_QUERIES", "BOX_NOISE")))
        within(0, 1, "MODEL.CODETR.DENOISING.LABEL_NOISE", "MODEL.CODETR.SOFT_NMS_THRESH")
        positive("MODEL.ATSS.TOPK", "MODEL.ATSS.ANCHOR_SCALE", "MODEL.ATSS.PRE_NMS_TOPK_TEST")
        within(0, math.inf, "MODEL.ATSS.NUM_CONVS")
        within(0, 1, "MODEL.ATSS.NMS_THRESH_TEST", "MODEL.RPN.NMS_THRESH_TEST")
        if len(cfg.MODEL.ATSS.BBOX_REG_WEIGHTS) != 4:
            raise InputError(
                f"MODEL.ATSS.BBOX_REG_WEIGHTS is {cfg.MODEL.ATSS.BBOX_REG_WEIGHTS}; it must have four entries: for x, "
                "y, width and height"
            )
    _check_backbone(cfg, positive, divisible)
    one_of("INPUT.FORMAT", ["RGB", "BGR", "L", "YUV-BT.601"])
    within(0, math.inf, "INPUT.MIN_SIZE_TEST")  # 0: images keep their size
    positive("INPUT.MAX_SIZE_TEST")
    if cfg.INPUT.MIN_SIZE_TEST > 0:
        _check_canvas(cfg, "INPUT.MAX_SIZE_TEST")
    if cfg.DATALOADER.NUM_WORKERS < 0:
        raise InputError(f"DATALOADER.NUM_WORKERS is {cfg.DATALOADER.NUM_WORKERS}; it must be 0 (no workers) or more")
    positive("TEST.DETECTIONS_PER_IMAGE")
    if solver.AMP.ENABLED:
        one_of("SOLVER.AMP.DTYPE", ["bfloat16"] if resolve_device(cfg) == "cpu" else ["bfloat16", "float16"])

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

    positive("SOLVER.IMS_PER_BATCH", "SOLVER.MAX_ITER", "SOLVER.CHECKPOINT_PERIOD", "SOLVER.ACCUMULATE_STEPS")
    positive("SOLVER.BASE_LR")
    if not 0 < solver.LAYER_DECAY <= 1:
        raise InputError(f"SOLVER.LAYER_DECAY is {solver.LAYER_DECAY}; it must be greater than 0 and at most 1")
    if solver.LAYER_DECAY < 1 and cfg.MODEL.BACKBONE.NAME != "build_eva02_pyramid_backbone":
        raise InputError(
            f"SOLVER.LAYER_DECAY is {solver.LAYER_DECAY}, but MODEL.BACKBONE.NAME {cfg.MODEL.BACKBONE.NAME} has no ViT "
            "blocks; set 1.0, or take build_eva02_pyramid_backbone"
        )
    share = num_processes * solver.ACCUMULATE_STEPS
    divisible(
        "SOLVER.IMS_PER_BATCH", solver.IMS_PER_BATCH, share, "the number of processes times SOLVER.ACCUMULATE_STEPS"
    )
    one_of("SOLVER.LR_SCHEDULER_NAME", ["WarmupMultiStepLR", "WarmupCosineLR", "WarmupStepWithFixedGammaLR"])
    one_of("SOLVER.WARMUP_METHOD", ["linear", "constant"])
    one_of("SOLVER.CLIP_GRADIENTS.CLIP_TYPE", ["full_model", "norm", "value"])
    one_of("DATALOADER.SAMPLER_TRAIN", TRAIN_SAMPLERS)
    one_of("INPUT.RANDOM_FLIP", ["none", "horizontal", "vertical"])
    _check_train_sizes(cfg, one_of, positive)
    one_of("INPUT.CROP.TYPE", ["relative_range", "relative", "absolute", "absolute_range"])
    one_of("INPUT.MASK_FORMAT", ["polygon", "bitmask"])
    _check_crop(cfg)
    _check_jitter(cfg)
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
        steps = _get(cfg, key)
        if any(a >= b for a, b in zip(steps, steps[1:])):
            raise InputError(f"{key} is {steps}; it must rise from entry to entry")
    if solver.MAX_EPOCHS <= 0 and solver.MAX_ITER in solver.STEPS:
        raise InputError(f"SOLVER.STEPS is {solver.STEPS}; its entries must not be SOLVER.MAX_ITER ({solver.MAX_ITER})")


def _backbone_features(cfg: CfgNode) -> list[str] | None:
    """Names of the features that a backbone has, or None where only the built backbone knows."""
    return {
        "build_resnet_backbone": cfg.MODEL.RESNETS.OUT_FEATURES,
        "build_swin_backbone": [f"p{i}" for i in range(len(cfg.MODEL.SWIN.DEPTHS))],
        "build_eva02_pyramid_backbone": [f"p{i}" for i in range(2, 7)],
    }.get(cfg.MODEL.BACKBONE.NAME)


def _check_backbone(cfg: CfgNode, positive: Callable, divisible: Callable) -> None:
    """Check the options of the backbone, by the checks of :func:`check_config`."""

    def in_unit_interval(key: str) -> None:
        if not 0 <= _get(cfg, key) < 1:
            raise InputError(f"{key} is {_get(cfg, key)}; it must be at least 0 and less than 1")

    name, swin, vit = cfg.MODEL.BACKBONE.NAME, cfg.MODEL.SWIN, cfg.MODEL.EVA02
    if name in ("build_swin_backbone", "build_swin_fpn_backbone"):
        positive("MODEL.SWIN.EMBED_DIM", "MODEL.SWIN.WINDOW_SIZE")
        in_unit_interval("MODEL.SWIN.DROP_PATH_RATE")
        if len(swin.DEPTHS) != len(swin.NUM_HEADS):
            raise InputError(
                f"MODEL.SWIN.NUM_HEADS is {swin.NUM_HEADS}; it must have an entry for each of MODEL.SWIN.DEPTHS "
                f"({swin.DEPTHS})"
            )
        if not all(isinstance(x, int) and x > 0 for x in (*swin.DEPTHS, *swin.NUM_HEADS)):
            raise InputError("MODEL.SWIN.DEPTHS and MODEL.SWIN.NUM_HEADS must have only whole numbers greater than 0")
        for i, heads in enumerate(swin.NUM_HEADS):
            what = f"entry {i} of MODEL.SWIN.NUM_HEADS"
            divisible(f"MODEL.SWIN.EMBED_DIM times {2**i}", swin.EMBED_DIM * 2**i, heads, what)
    if name.endswith("_fpn_backbone") and not cfg.MODEL.FPN.IN_FEATURES:
        raise InputError(f"MODEL.FPN.IN_FEATURES is empty; {name} needs the names of the features below its FPN")
    if name == "build_eva02_pyramid_backbone":
        positive(*(f"MODEL.EVA02.{x}" for x in ("EMBED_DIM", "DEPTH", "NUM_HEADS", "WINDOW_SIZE")))
        positive("MODEL.EVA02.PATCH_SIZE", "MODEL.EVA02.PRETRAIN_IMAGE_SIZE", "MODEL.FPN.OUT_CHANNELS")
        in_unit_interval("MODEL.EVA02.DROP_PATH_RATE")
        divisible("MODEL.EVA02.EMBED_DIM", vit.EMBED_DIM, 4 * vit.NUM_HEADS, "4 times MODEL.EVA02.NUM_HEADS")
        divisible("MODEL.EVA02.PATCH_SIZE", vit.PATCH_SIZE, 4, "the refinement to p2")
        divisible("MODEL.EVA02.PRETRAIN_IMAGE_SIZE", vit.PRETRAIN_IMAGE_SIZE, vit.PATCH_SIZE, "MODEL.EVA02.PATCH_SIZE")
        divisible("MODEL.EVA02.IMAGE_SIZE", vit.IMAGE_SIZE, 2 * vit.PATCH_SIZE, "twice MODEL.EVA02.PATCH_SIZE")
        outside = [i for i in vit.GLOBAL_BLOCKS if i not in range(vit.DEPTH)]
        if outside:
            raise InputError(
                f"MODEL.EVA02.GLOBAL_BLOCKS has {outside[0]!r}, but blocks count from 0 to MODEL.EVA02.DEPTH - 1 "
                f"({vit.DEPTH - 1})"
            )
        if cfg.MODEL.META_ARCHITECTURE == "CoDETR":
            canvas, dim, channels = cfg.MODEL.CODETR.CANVAS_SIZE, cfg.MODEL.CODETR.EMBED_DIM, cfg.MODEL.FPN.OUT_CHANNELS
            if vit.IMAGE_SIZE not in (0, canvas):
                raise InputError(
                    f"MODEL.EVA02.IMAGE_SIZE is {vit.IMAGE_SIZE}; it must be 0, or MODEL.CODETR.CANVAS_SIZE "
                    f"({canvas}): the side of the square that images lie on"
                )
            if not cfg.MODEL.CODETR.NECK and channels != dim:
                raise InputError(
                    f"MODEL.FPN.OUT_CHANNELS is {channels}; without MODEL.CODETR.NECK it must be "
                    f"MODEL.CODETR.EMBED_DIM ({dim})"
                )


def _check_canvas(cfg: CfgNode, key: str) -> None:
    """Images that are resized to the longest side that ``key`` allows fit on the canvas, if there is one."""
    canvas = cfg.MODEL.CODETR.CANVAS_SIZE
    if cfg.MODEL.META_ARCHITECTURE == "CoDETR" and 0 < canvas < _get(cfg, key):
        raise InputError(
            f"{key} is {_get(cfg, key)}; images must fit on the square of MODEL.CODETR.CANVAS_SIZE ({canvas}): set it "
            "to that"
        )


def _check_train_sizes(cfg: CfgNode, one_of: Callable, positive: Callable) -> None:
    """Check the resizing of the training, by the checks of :func:`check_config`."""
    sizes, sampling = cfg.INPUT.MIN_SIZE_TRAIN, cfg.INPUT.MIN_SIZE_TRAIN_SAMPLING
    if not (sizes and all(isinstance(x, int) and x >= 0 for x in sizes)):
        raise InputError(
            f"INPUT.MIN_SIZE_TRAIN is {sizes}; it must be a list of whole numbers of pixels, like [480, 512]"
        )
    positive("INPUT.MAX_SIZE_TRAIN")
    one_of("INPUT.MIN_SIZE_TRAIN_SAMPLING", ["choice", "range"])
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
    if not _get(cfg, needed):
        raise InputError(f"{needed} is empty; name a dataset there, one of DATASETS.COCO_JSON or of detectron2's own")
    described = ", ".join(name for name, _, _ in cfg.DATASETS.COCO_JSON) or "none"
    for key in dict.fromkeys((needed, "DATASETS.TEST")):
        for name in _get(cfg, key):
            if name not in DatasetCatalog:
                raise InputError(
                    f"{key} has {name!r}, which is not registered. DATASETS.COCO_JSON describes {described}: add the "
                    "[name, image folder, annotation json] of yours, or take one of detectron2's, like coco_2017_train"
                )


def check_output_dir(cfg: CfgNode, resume: bool, eval_only: bool = False) -> None:
    """Make ``OUTPUT_DIR``, and make sure that the run does not spoil what another one has left there.

    Raises:
        InputError: the folder cannot be written; unless ``eval_only`` it holds a run that is not to be resumed or, with
            ``resume``, a run of another model or other datasets. Options of the solver may change, so that a run can be
            prolonged.
    """
    folder = cfg.OUTPUT_DIR
    try:
        os.makedirs(folder, exist_ok=True)
        names = os.listdir(folder)
    except OSError as error:
        raise InputError(f"OUTPUT_DIR: cannot use the folder {folder}: {error.strerror}") from None
    if not os.access(folder, os.W_OK):
        raise InputError(f"OUTPUT_DIR: the folder {folder} cannot be written")
    if eval_only:
        return
    holds_run = any(re.fullmatch(r"model_.*\.pth|last_checkpoint", name) for name in names)
    holds_run |= "metrics.json" in names and os.path.getsize(os.path.join(folder, "metrics.json")) > 0
    if holds_run and not resume:
        raise InputError(
            f"OUTPUT_DIR: {folder} already holds a run; go on with it by --resume, or choose another OUTPUT_DIR"
        )
    path = os.path.join(folder, "config.yaml")
    if not (holds_run and os.path.isfile(path)):
        return
    try:
        with open(path, encoding="utf-8") as file:
            before = dict(_flatten(yaml.safe_load(file), cfg))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
        raise InputError(f"{path}: not a config; delete it if the run in this folder is the one to resume") from None
    differing = [
        f"{key} ({_plain(before[key])} there, {_plain(value)} now)"
        for key, value in _flatten(cfg, cfg)
        if (key.startswith("MODEL.") or key == "DATASETS.TRAIN") and key not in _FREE_TO_CHANGE
        if key in before and _plain(before[key]) != _plain(value)
    ]
    if differing:
        shown = "; ".join(differing[:5]) + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise InputError(
            f"OUTPUT_DIR: {folder} holds a run of another config, which cannot be resumed with this one: {shown}"
        )


def save_config(cfg: CfgNode) -> None:
    """Write the config to ``OUTPUT_DIR/config.yaml``."""
    atomic_write(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), lambda file: file.write(cfg.dump().encode()))


def _get(cfg: CfgNode, key: str):
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def _plain(value):
    """Tuples as lists, as YAML has them."""
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value
