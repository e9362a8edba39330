"""The output folder of a run, and what may change where the run is resumed."""

import os
import re
from fnmatch import fnmatchcase

import yaml
from detectron2.config import CfgNode

from ..checkpoint.checkpointer import check_writable
from ..errors import InputError
from .config_file import options_of

__all__ = ["check_output_dir"]

# Options of the model that may change when a run is resumed: they change neither its weights nor what they mean.
_FREE_TO_CHANGE = (
    "MODEL.WEIGHTS",
    "MODEL.DEVICE",
    "MODEL.MS_DEFORM_ATTN",
    "MODEL.*.ACTIVATION_CHECKPOINTING",
    "MODEL.CODETR.CLASS_NAMES",
    "MODEL.CODETR.COMPILE",
    "MODEL.CODETR.EVAL_HEAD",
    "MODEL.CODETR.INFERENCE_DTYPE",
    "MODEL.CODETR.REUSE_CLASSES",
    "MODEL.TIMM.PRETRAINED",
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
    check_writable(folder)
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
            before = dict(options_of(yaml.safe_load(file), cfg))
    except (yaml.YAMLError, UnicodeDecodeError, AttributeError):
        raise InputError(f"{path}: not a config; delete it if the run in this folder is the one to resume") from None
    differing = [
        f"{key} ({_plain(before[key])} there, {_plain(value)} now)"
        for key, value in options_of(cfg, cfg)
        if key.startswith("MODEL.") or key == "DATASETS.TRAIN"
        if not any(fnmatchcase(key, pattern) for pattern in _FREE_TO_CHANGE)
        if key in before and _plain(before[key]) != _plain(value)
    ]
    if differing:
        shown = "; ".join(differing[:5]) + (f"; and {len(differing) - 5} more" if len(differing) > 5 else "")
        raise InputError(
            f"OUTPUT_DIR: {folder} holds a run of another config, which cannot be resumed with this one: {shown}"
        )


def _plain(value):
    """Tuples as lists, as YAML has them."""
    return [_plain(x) for x in value] if isinstance(value, (list, tuple)) else value
