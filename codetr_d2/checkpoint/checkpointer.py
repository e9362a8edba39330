"""Checkpoints: written whole or not at all, read without running anything that a file might hold."""

import contextlib
import fcntl
import os
import secrets
import tempfile
from collections.abc import Callable, Sequence
from typing import IO, Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer
from torch import Tensor, nn

from ..errors import InputError, named_disk_problems
from ..modeling.facts import class_rows, stated
from ..modeling.query_heads import QUERY_HEAD_REGISTRY
from . import hugging_face  # noqa: F401 (detectron2's paths may begin with hf://)
from .bare_backbone import adapt_backbone
from .classes import adapt_classifiers, dataset_classes, match_classes, number_of_classes, rows_of
from .finite import brief, check_finite, not_finite
from .published import describe, is_published, name_positive_queries, published_to_codetr
from .safe_load import load_numpy_pickle, load_torch, weights_entry

__all__ = ["CoDETRCheckpointer", "atomic_write", "check_writable", "last_whole"]


def _are_weights(value: Any) -> bool:
    """Whether it is a dict of named tensors or arrays."""
    return (
        isinstance(value, dict)
        and len(value) > 0
        and all(isinstance(name, str) and hasattr(x, "shape") for name, x in value.items())
    )


def atomic_write(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file such that, whenever the process is killed, either the old or the whole new one is there.

    Args:
        path: the file.
        write: writes the content into the binary file object that it is given.

    Raises:
        InputError: the disk is full or broken; what was there is still there.
    """
    folder = os.path.dirname(path) or "."
    _remove_abandoned(folder)
    with named_disk_problems(path):
        temporary, file = _new_unfinished(folder)
        try:
            with file:
                write(file)
                file.flush()
                os.fsync(file.fileno())
                os.replace(temporary, path)
        except BaseException:
            with contextlib.suppress(FileNotFoundError):
                os.remove(temporary)
            raise
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the new name itself
    finally:
        os.close(descriptor)


def last_whole(folder: str) -> str:
    """A sentence that names the last checkpoint of a run, which is always whole."""
    try:
        with open(os.path.join(folder, "last_checkpoint"), encoding="utf-8") as file:
            return f"The last whole checkpoint is {os.path.join(folder, file.read().strip())}."
    except OSError:
        return "No checkpoint was written before."


def check_writable(folder: str) -> None:
    """Make sure, by doing so, that files can be written into a folder.

    Raises:
        InputError: there is none, or it cannot be written.
    """
    try:
        with tempfile.TemporaryFile(dir=folder) as file:
            file.write(b"0")
    except OSError as error:
        raise InputError(
            f"{folder}: nothing can be written into this folder: {error.strerror}; choose another"
        ) from None


_UNFINISHED = ".unfinished_"


def _new_unfinished(folder: str) -> tuple[str, IO[bytes]]:
    """A file of a name of its own, as others may write into the folder; locked as long as it is open."""
    while True:
        path = os.path.join(folder, _UNFINISHED + secrets.token_hex(8))
        file = open(path, "xb")  # noqa: SIM115
        with contextlib.suppress(OSError):  # a file system without locks; there nobody removes it either
            fcntl.flock(file, fcntl.LOCK_EX)
        if os.path.exists(path):  # otherwise it was taken for an abandoned one before it was locked
            return path, file
        file.close()


def _remove_abandoned(folder: str) -> None:
    """Remove the unfinished files of processes that were killed: those that nobody has locked."""
    for name in os.listdir(folder):
        if name.startswith(_UNFINISHED):
            with contextlib.suppress(OSError), open(os.path.join(folder, name), "r+b") as file:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                os.remove(file.name)


class CoDETRCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer with atomic writes, safe reads, names of other codes, and clear errors.

    Reads checkpoints of this project and of detectron2, the published Co-DETR weights, and files that hold a backbone
    only (see :func:`adapt_backbone`). Where a training checkpoint holds a moving average ("ema") and only weights are
    asked for, the averaged ones are loaded: they are the ones to use. Auxiliary heads are found by their names, so that
    a model may have fewer than its weights, or others.

    Args:
        model, save_dir, checkpointables: see the base class.
        fine_tune: the weights are what a training starts from, so their classes may be others: classifiers then start
            anew, but for those that ``reuse_classes`` finds. Otherwise another number of classes is an error.
        class_names: of the model.
        reuse_classes: the dataset that the weights were trained on, to take over the classifiers of classes that have
            the same name; "" for none.

    Raises:
        InputError: from ``load`` and ``resume_or_load``, for a file that is missing, truncated, unsafe, or of another
            model, or with values that are not finite; from ``save``, for such weights and a disk that is full.
    """

    def __init__(
        self,
        model: nn.Module,
        save_dir: str = "",
        *,
        fine_tune: bool = False,
        class_names: Sequence[str] = (),
        reuse_classes: str = "",
        **checkpointables: Any,
    ):
        super().__init__(model, save_dir, **checkpointables)
        self._fine_tune = fine_tune
        self._class_names = list(class_names)
        self._reuse_classes = reuse_classes

    def save(self, name: str, **kwargs) -> None:
        """Write ``name.pth`` atomically and make it the checkpoint to resume from.

        Arguments are those of the base class.
        """
        if not self.save_dir or not self.save_to_disk:
            return
        data = {"model": self.model.state_dict()}
        data.update((key, item.state_dict()) for key, item in self.checkpointables.items())
        data.update(kwargs)
        path = os.path.join(self.save_dir, f"{name}.pth")
        if faulty := not_finite({**data["model"], **data.get("ema", {})}):
            raise InputError(
                f"{path}: not written, as the training has diverged: NaN or infinity in {brief(faulty)}. "
                f"{last_whole(self.save_dir)} Train with a lower SOLVER.BASE_LR."
            )
        self.logger.info("Saving checkpoint to %s", path)
        atomic_write(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        atomic_write(path, lambda file: file.write(last_filename_basename.encode()))

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict:
        wanted = self.checkpointables if checkpointables is None else checkpointables
        self._weights_only = not wanted  # otherwise a run is resumed
        self._path = path
        file = path.split("?")[0]
        if "://" in file:
            self._fetch(file)
        elif file and not os.path.isfile(file):
            raise InputError(f"{file}: no such checkpoint; mend MODEL.WEIGHTS, or the name in the file last_checkpoint")
        return super().load(path, checkpointables)

    def _fetch(self, address: str) -> None:
        """Download a file to where ``load`` finds it."""
        try:
            found, reason = os.path.isfile(self.path_manager.get_local_path(address)), "no such address is known"
        except InputError:
            raise
        except (OSError, RuntimeError, ValueError, AssertionError) as error:
            found, reason = False, str(error).strip().split("\n")[0]
        if not found:
            raise InputError(
                f"{address}: cannot be fetched ({reason}); check the address and the network, or download the file by "
                "other means and give its path"
            )

    def _load_file(self, filename: str) -> dict:
        if filename.endswith(".pkl"):
            data = load_numpy_pickle(filename)
            if "model" in data and "__author__" in data:
                return data
            data = data.get("blobs", data)
            weights = {k: v for k, v in data.items() if isinstance(v, np.ndarray) and not k.endswith("_momentum")}
            return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
        if filename.endswith(".pyth"):
            raise InputError(f"{filename}: convert this file of pycls to a .pth file, with torch.save(state_dict)")
        return super()._load_file(filename)

    def _torch_load(self, filename: str) -> dict:
        data, dropped = load_torch(filename)
        data.pop("matching_heuristics", None)  # an option of MODEL.WEIGHTS, not of a file
        if dropped:
            self.logger.info("Not read, because it is no tensor and no plain value: %s", brief(dropped))
        entry = weights_entry(data)
        if entry and entry != "model":
            data["model"] = data.pop(entry)
        return data

    def _load_model(self, checkpoint: dict):
        weights = checkpoint["model"]
        if not _are_weights(weights):
            raise InputError(f"{self._path}: holds no dict of named tensors, so it is no checkpoint of a model")
        if not self._weights_only and _are_weights(checkpoint.get("ema")):  # of a run of before that is resumed
            checkpoint["ema"] = name_positive_queries(checkpoint["ema"])
        # A resumed run without an average goes on with the weights themselves.
        average = checkpoint.pop("ema", {}) if self._weights_only else {}
        average = average if _are_weights(average) else {}  # other codes keep other things under this name
        weights = {name.removeprefix("module."): value for name, value in {**weights, **average}.items()}
        self._convert_ndarray_to_tensor(weights)
        names = list(weights)
        own = self.model.state_dict()
        takes_what_fits = checkpoint.get("matching_heuristics", False)

        beside = checkpoint.keys() - {"model", "matching_heuristics"}
        if is_published(weights) and beside:
            self.logger.info("Not used: entries beside the weights: %s", ", ".join(sorted(beside)))
        weights = self._in_our_names(weights, own)
        anew = set()
        if not takes_what_fits:
            _check_family(self._path, weights, own)
            weights, anew = self._adapt_classes(weights, own)
        used = {name: x for name, x in weights.items() if name in own or takes_what_fits}
        check_finite(self._path.split("?")[0], {**used, **(checkpoint.get("ema") or {})})
        checkpoint["model"] = weights
        is_detector = any(name.startswith("query_head.") for name in weights)

        incompatible = super()._load_model(checkpoint)
        incompatible.missing_keys[:] = [key for key in incompatible.missing_keys if key not in anew]
        if incompatible.incorrect_shapes and not takes_what_fits:
            self._raise_incorrect_shapes(incompatible.incorrect_shapes)
        if not self._loaded(incompatible):
            raise InputError(
                f"{self._path}: no tensor of it belongs to this model: it has {brief(names)}; the model has "
                f"{brief(sorted(own))}"
            )
        if is_detector and not takes_what_fits:
            self._check_parts(incompatible, set(weights) | anew, set(own))
        return incompatible

    def _in_our_names(self, weights: dict[str, Tensor], own: dict[str, Tensor]) -> dict[str, Tensor]:
        """Translate names of other codes, and log what has no place in the model."""
        unused = {}
        if is_published(weights):
            weights, unused = published_to_codetr(weights)
        elif not own.keys() & weights.keys():
            weights, unused = adapt_backbone(weights, own)
        for line in describe(unused):
            self.logger.info("Not used: %s", line)
        return name_positive_queries(weights)

    def _adapt_classes(self, weights: dict[str, Tensor], own: dict) -> tuple[dict[str, Tensor], set[str]]:
        """Deal with classes other than the model's; the second value names the tensors that start anew."""
        rows = class_rows(self.model)
        in_file, in_model = number_of_classes(weights, rows), number_of_classes(own, rows)
        if in_file is None or in_model is None:
            return weights, set()
        starts_training = self._fine_tune and self._weights_only
        if not starts_training and in_file != in_model:
            raise InputError(
                f"{self._path}: has {in_file} classes, but MODEL.CODETR.NUM_CLASSES is {in_model}; "
                f"set it to {in_file}, or train on the other classes with this file as MODEL.WEIGHTS"
            )
        if not starts_training or (in_file == in_model and not self._reuse_classes):
            return weights, set()
        if not self._reuse_classes:
            self.logger.warning(
                "%s has %d classes and the model %d: the classifiers start anew (MODEL.CODETR.REUSE_CLASSES takes over "
                "those of classes with the same name)",
                self._path,
                in_file,
                in_model,
            )
            return adapt_classifiers(weights, own, rows, None)
        given = dataset_classes(self._reuse_classes)
        if len(given) != in_file or len(self._class_names) != in_model:
            what, names, number = (
                (f"the dataset {self._reuse_classes}", given, f"{self._path} has {in_file} classes")
                if len(given) != in_file
                else ("MODEL.CODETR.CLASS_NAMES", self._class_names, f"MODEL.CODETR.NUM_CLASSES is {in_model}")
            )
            raise InputError(
                f"MODEL.CODETR.REUSE_CLASSES: {what} names {len(names)} classes, but {number}; name the dataset that "
                "the weights were trained on, or set it to '' to start the classifiers anew"
            )
        matches = match_classes(self._class_names, given)
        self.logger.warning(
            "Took over the classifiers of %d of %d classes by their names in %s; the others start anew",
            len(matches),
            in_model,
            self._reuse_classes,
        )
        return adapt_classifiers(weights, own, rows, matches)

    def _check_parts(self, incompatible, in_file: set[str], in_model: set[str]) -> None:
        """Refuse a detector that differs from the model in more than a part that one of them may lack.

        What only the file has is logged with the reason, and leaves the list of unexpected names.
        """
        differing = [*incompatible.missing_keys, *incompatible.unexpected_keys]
        own_part, others = {}, {}
        for name in differing:
            part, reason = stated(self.model, "OPTIONAL_PARTS", name) or ("", "")
            other_side = in_file if name in in_model else in_model
            if part and not any(x.startswith(f"{part}.") for x in other_side):
                own_part[name] = reason
            elif hasattr(self.model, name.split(".")[0]):
                others[name] = (stated(self.model, "OPTIONS_OF_NAMES", name) or ("", "MODEL"))[1]
        if others:
            lacking = [name for name in others if name in in_model]
            surplus = [name for name in others if name not in in_model]
            sides = [f"lacks {brief(lacking)}"] * bool(lacking) + [f"has {brief(surplus)}"] * bool(surplus)
            raise InputError(
                f"{self._path}: weights of another model, or with names of another version: compared with the model it "
                f"{' and '.join(sides)}; choose the config that belongs to the file (look at "
                f"{next(iter(others.values()))}), or load what fits with MODEL.WEIGHTS "
                f"'{self._path.split('?')[0]}?matching_heuristics=True'"
            )
        for line in describe({name: reason for name, reason in own_part.items() if name not in in_model}):
            self.logger.info("Not used: %s", line)
        incompatible.unexpected_keys[:] = [name for name in incompatible.unexpected_keys if name not in own_part]

    def _loaded(self, incompatible) -> list[str]:
        """Names of the model's tensors that came from the file."""
        left_out = {*incompatible.missing_keys, *(key for key, _, _ in incompatible.incorrect_shapes)}
        # Where a file has none, torch makes up a counter of batches, and detectron2 the statistics of a frozen norm.
        made_up = {f"{key.removesuffix('.weight')}.running_{x}" for key in left_out for x in ("mean", "var")}
        return [
            key
            for key in self.model.state_dict()
            if key not in left_out | made_up and not key.endswith("num_batches_tracked")
        ]

    def _raise_incorrect_shapes(self, incorrect: list[tuple[str, tuple, tuple]]) -> None:
        key, in_file, in_model = incorrect[0]
        place, option = stated(self.model, "OPTIONS_OF_SHAPES", key) or ("", "MODEL")
        if not place and rows_of(key, class_rows(self.model)):
            option = "MODEL.CODETR.NUM_CLASSES"
        others = f" (and {len(incorrect) - 1} more: {brief([k for k, _, _ in incorrect[1:]])})" if incorrect[1:] else ""
        raise InputError(
            f"{self._path}: {key} has the shape {list(in_file)} in the file and {list(in_model)} in the model{others}; "
            f"set {option} as in the file, or load only what fits, for instance to fine-tune on other classes, with "
            f"MODEL.WEIGHTS '{self._path.split('?')[0]}?matching_heuristics=True'"
        )

    def _log_incompatible_keys(self, incompatible) -> None:
        missing, unexpected = incompatible.missing_keys, incompatible.unexpected_keys
        other_shape = [key for key, _, _ in incompatible.incorrect_shapes]
        if all(key.startswith("backbone.") for key in self._loaded(incompatible)):
            self.logger.info("Loaded the backbone (%d tensors); the rest starts anew", len(self._loaded(incompatible)))
            missing = [key for key in missing if key.startswith("backbone.")]
        for keys, what in (
            (missing, "tensors of the model are not in the checkpoint"),
            (unexpected, "tensors of the checkpoint are not in the model"),
            (other_shape, "tensors have another shape in the checkpoint, and start anew"),
        ):
            if keys:
                self.logger.warning("%d %s: %s", len(keys), what, brief(keys))


def _check_family(path: str, weights: dict[str, Tensor], own: dict[str, Tensor]) -> None:
    marks = {head: f"query_head.{getattr(cls, 'TELLING_PARAMETER', '')}" for head, cls in QUERY_HEAD_REGISTRY}
    for head, mark in marks.items():
        if mark in weights and mark not in own and any(name.startswith("query_head.") for name in own):
            raise InputError(
                f"{path}: weights of another kind of model; choose a config with MODEL.CODETR.QUERY_HEAD {head}"
            )
