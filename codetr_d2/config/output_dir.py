"""The output folder of a run, and what may change where the run is resumed."""

import hashlib
import logging
import os
import re
from fnmatch import fnmatchcase

import yaml
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.utils.file_io import PathManager

from ..checkpoint.checkpointer import check_writable
from ..errors import InputError
from .config_file import options_of, plain

__all__ = ["check_output_dir", "check_training_data", "training_data"]

logger = logging.getLogger(__name__)

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


# What else of a config may change, and is said.
_OF_THE_TRAINING = ("SOLVER.", "DATASETS.", "INPUT.", "DATALOADER.")


def check_output_dir(cfg: CfgNode, resume: bool, eval_only: bool = False) -> None:
    """Make ``OUTPUT_DIR``, and make sure that the run does not spoil what another one has left there.

    Raises:
        InputError: the folder cannot be written; unless ``eval_only`` it holds a run that is not to be resumed or, with
            ``resume``, a run of another model or other datasets, or a schedule in epochs for batches of another size.
            Other options of the training may change, which is said in one line.
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
    changed = {
        key: f"{key} ({plain(before[key])} there, {plain(value)} now)"
        for key, value in options_of(cfg, cfg)
        if key in before and plain(before[key]) != plain(value)
    }
    differing = [
        text
        for key, text in changed.items()
        if key.startswith("MODEL.") or key == "DATASETS.TRAIN"
        if not any(fnmatchcase(key, pattern) for pattern in _FREE_TO_CHANGE)
    ]
    if differing:
        raise InputError(
            f"OUTPUT_DIR: {folder} holds a run of another config, which cannot be resumed with this one: "
            f"{_shown(differing)}"
        )
    in_epochs = cfg.SOLVER.MAX_EPOCHS > 0
    if in_epochs and "SOLVER.IMS_PER_BATCH" in changed:
        raise InputError(
            f"OUTPUT_DIR: the run in {folder} counts in batches of another size: {changed['SOLVER.IMS_PER_BATCH']}. "
            "Its schedule in epochs (SOLVER.MAX_EPOCHS) cannot go on with these; set the size as it was"
        )
    # A schedule in epochs has set MAX_ITER and STEPS there.
    unsaid = ("SOLVER.MAX_ITER", "SOLVER.STEPS") if in_epochs else ()
    others = [text for key, text in changed.items() if key.startswith(_OF_THE_TRAINING) and key not in unsaid]
    if others:
        logger.warning("The resumed run goes on with other options than before: %s", _shown(others))


def _shown(texts: list[str]) -> str:
    return "; ".join(texts[:5]) + (f"; and {len(texts) - 5} more" if len(texts) > 5 else "")


def training_data(cfg: CfgNode, num_images: int) -> dict[str, object]:
    """What tells the datasets of ``DATASETS.TRAIN`` from others, wherever they lie; see :func:`check_training_data`."""
    files = {name: path for name, _, path in cfg.DATASETS.COCO_JSON}
    digests = {}
    for name in cfg.DATASETS.TRAIN:
        path = files.get(name) or MetadataCatalog.get(name).get("json_file", "")
        if PathManager.isfile(path):
            digest = hashlib.blake2b(digest_size=16)
            with PathManager.open(path, "rb") as file:
                while block := file.read(1 << 20):
                    digest.update(block)
            digests[name] = digest.hexdigest()
    return {"images": num_images, "annotation_files": digests}


def check_training_data(cfg: CfgNode, before: dict, now: dict) -> None:
    """Make sure that a run is resumed with the data that it was begun with.

    Args:
        cfg: the config.
        before, now: what :func:`training_data` says of the run's data and of those that there are.

    Raises:
        InputError: they differ.
    """
    if before != now:
        counts = f"{before['images']} images there, {now['images']} now"
        what = counts if before["images"] != now["images"] else "another annotation file"
        raise InputError(
            f"DATASETS.TRAIN: {', '.join(cfg.DATASETS.TRAIN)} is not what the run in {cfg.OUTPUT_DIR} was trained on "
            f"({what}), so that it cannot be resumed; put the data back, or start another run in another OUTPUT_DIR, "
            "with a checkpoint of this one as MODEL.WEIGHTS"
        )
