"""Reading configs, and writing the one of a run."""

import difflib
import os
from collections.abc import Collection, Iterator, Sequence

import torch
import yaml
from detectron2.config import CfgNode, get_cfg
from detectron2.utils.file_io import PathManager

from ..checkpoint.checkpointer import atomic_write
from ..errors import InputError
from .defaults import add_codetr_config
from .zoo import find_config_file

__all__ = ["load_config", "options_of", "plain", "resolve_device", "save_config"]


def load_config(config_file: str, opts: Sequence[str] = ()) -> CfgNode:
    """Read a config file, the files that its ``_BASE_`` names, and options of the command line, in detectron2's format.

    ``~`` at the start of a path is the home folder.

    Args:
        config_file: a YAML file; or, where there is no such file, a name of the model zoo like
            "co_dino/co_dino_5scale_r50_1x_coco.yaml". So may ``_BASE_`` be, whose paths are relative to its own file.
        opts: key, value, key, value, ...

    Raises:
        InputError: a file is missing or malformed, an option is unknown, or its value has the wrong type.
    """
    cfg = get_cfg()
    add_codetr_config(cfg)
    _merge_file(cfg, find_config_file(config_file), ())
    for key in opts[::2]:
        if key.startswith("-"):
            raise InputError(f"{key}: flags must stand before the KEY VALUE pairs of the command line")
    if len(opts) % 2:
        raise InputError(f"the command line's options must be KEY VALUE pairs, but {opts[-1]} has no value")
    for key, value in zip(opts[::2], opts[1::2]):
        _set(cfg, key, value, "command line")
    _check_schedule(cfg, opts[::2], "command line")
    cfg.OUTPUT_DIR = os.path.expanduser(cfg.OUTPUT_DIR)
    cfg.MODEL.WEIGHTS = os.path.expanduser(cfg.MODEL.WEIGHTS)
    cfg.DATASETS.COCO_JSON = _expanded(cfg.DATASETS.COCO_JSON)
    return cfg


def _expanded(entries: object) -> object:
    """``DATASETS.COCO_JSON`` with the home folder in place of ``~``; what is no entry of it is left to its check."""
    if isinstance(entries, (list, tuple)):
        return type(entries)(_expanded(x) for x in entries)
    return os.path.expanduser(entries) if isinstance(entries, str) else entries


def _merge_file(cfg: CfgNode, path: str, parents: tuple[str, ...]) -> None:
    origin = f" (_BASE_ of {parents[-1]})" if parents else ""
    if os.path.realpath(path) in map(os.path.realpath, parents):
        raise InputError(f"{path}: its _BASE_ leads back to itself")
    try:
        with PathManager.open(path, encoding="utf-8") as file:
            loaded = yaml.safe_load(file) or {}
    except OSError as error:
        raise InputError(f"{path}: cannot read this config file{origin}: {error.strerror or error}") from None
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise InputError(f"{path}: not valid YAML: {' '.join(str(error).split())}") from None
    if not isinstance(loaded, dict):
        raise InputError(f"{path}: a config must be a mapping of options, not a {type(loaded).__name__}")
    bases = loaded.pop("_BASE_", [])
    for base in [bases] if isinstance(bases, str) else bases:
        try:
            base = find_config_file(base, os.path.dirname(path))
        except InputError as error:
            raise InputError(f"{error} (_BASE_ of {path})") from None
        _merge_file(cfg, base, (*parents, path))
    options = dict(options_of(loaded, cfg))
    for key, value in options.items():
        _set(cfg, key, value, path)
    _check_schedule(cfg, options, path)


def options_of(tree: dict, like: object, prefix: str = "") -> Iterator[tuple[str, object]]:
    """The options of nested dicts by their full keys, as deep as ``like`` goes."""
    for name, value in tree.items():
        section = like.get(name) if isinstance(like, dict) else None
        if isinstance(value, dict) and (isinstance(section, dict) or section is None):
            yield from options_of(value, section, f"{prefix}{name}.")
        elif not (value is None and isinstance(section, dict)):  # an empty section
            yield f"{prefix}{name}", value


def plain(value: object) -> object:
    """The value of an option as YAML has it: with lists for tuples."""
    return [plain(x) for x in value] if isinstance(value, (list, tuple)) else value


def _set(cfg: CfgNode, key: str, value: object, source: str) -> None:
    current = cfg
    for part in key.split("."):
        if not isinstance(current, CfgNode) or part not in current:
            known = [name for name, _ in options_of(cfg, cfg)]
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


def _check_schedule(cfg: CfgNode, keys: Collection[str], source: str) -> None:
    """A source that sets a schedule of one kind must not leave in force what overrides it: one of the other kind."""
    if "SOLVER.MAX_EPOCHS" in keys:
        return
    epochs = cfg.SOLVER.MAX_EPOCHS
    for key in ("SOLVER.STEPS_EPOCHS",) if epochs <= 0 else ("SOLVER.MAX_ITER", "SOLVER.STEPS"):
        if key in keys:
            mend = "set that too" if epochs <= 0 else "set SOLVER.MAX_EPOCHS 0 too"
            raise InputError(f"{source}: {key} has no effect, as SOLVER.MAX_EPOCHS is {epochs}; {mend}")


def resolve_device(cfg: CfgNode) -> str:
    """``MODEL.DEVICE``, or "cpu" where that is a GPU and there is none."""
    try:
        kind = torch.device(cfg.MODEL.DEVICE).type
    except RuntimeError:
        raise InputError(f"MODEL.DEVICE is {cfg.MODEL.DEVICE!r}; it may be cpu or cuda") from None
    return "cpu" if kind == "cuda" and not torch.cuda.is_available() else cfg.MODEL.DEVICE


def save_config(cfg: CfgNode) -> None:
    """Write the config to ``OUTPUT_DIR/config.yaml``."""
    atomic_write(os.path.join(cfg.OUTPUT_DIR, "config.yaml"), lambda file: file.write(cfg.dump().encode()))
