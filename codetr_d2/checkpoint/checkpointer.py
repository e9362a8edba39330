"""Checkpoints: written whole or not at all, read without running anything that a file might hold."""

import os
import pickle
import re
import zipfile
from collections import Counter
from collections.abc import Callable
from typing import IO, Any

import numpy as np
import torch
from detectron2.checkpoint import DetectionCheckpointer

from ..errors import InputError
from . import published

__all__ = ["CoDETRCheckpointer", "atomic_write", "load_numpy_pickle"]

# Which option a tensor of another shape points at; the first that fits counts.
_OPTION_OF_SHAPE = (
    (r"cls|class", "MODEL.CODETR.NUM_CLASSES"),
    (r"level_embed", "MODEL.CODETR.NUM_FEATURE_LEVELS"),
    (r"query|queries", "MODEL.CODETR.NUM_QUERIES"),
    (r"^backbone\.", "MODEL.BACKBONE"),
    (r"sampling_offsets|attention_weights", "MODEL.CODETR.NUM_FEATURE_LEVELS and the NUM_HEADS and NUM_POINTS"),
    (r"ffn|linear", "MODEL.CODETR.ENCODER.FFN_DIM and DECODER.FFN_DIM"),
    (r"", "MODEL.CODETR.EMBED_DIM"),
)


def atomic_write(path: str, write: Callable[[IO[bytes]], Any]) -> None:
    """Write a file such that, whenever the process is killed, either the old or the whole new one is there.

    Args:
        path: the file.
        write: writes the content into the binary file object that it is given.
    """
    folder = os.path.dirname(path) or "."
    temporary = os.path.join(folder, ".unfinished")  # one name for all: a killed run leaves at most this one behind
    try:
        with open(temporary, "wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        if os.path.exists(temporary):
            os.remove(temporary)
        raise
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        os.fsync(descriptor)  # the new name itself
    finally:
        os.close(descriptor)


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding}")
    return text.encode("latin1")


class _NumpyUnpickler(pickle.Unpickler):
    """Reads numpy arrays in plain containers and refuses anything else."""

    def find_class(self, module: str, name: str):
        module = module.replace("numpy._core", "numpy.core")
        if (module, name) in {("numpy.core.multiarray", "_reconstruct"), ("numpy.core.multiarray", "scalar")}:
            # What numpy's own pickles name, under the module path of the numpy that runs here.
            function = np.array(0).__reduce__()[0] if name == "_reconstruct" else np.float64(0).__reduce__()[0]
            return function
        if module == "numpy" and name in ("ndarray", "dtype"):
            return getattr(np, name)
        if (module, name) == ("collections", "OrderedDict"):
            return dict
        if (module, name) == ("_codecs", "encode"):  # how Python 3 writes bytes in pickles of protocol 2
            return _encode_latin1
        raise pickle.UnpicklingError(f"it asks for {module}.{name}")


def load_numpy_pickle(path: str) -> dict:
    """Read a ``.pkl`` file of detectron2's model zoo: numpy arrays in dicts, lists and tuples.

    Raises:
        InputError: the file is truncated, is no pickle, or holds anything else, which is not executed.
    """
    try:
        with open(path, "rb") as file:
            data = _NumpyUnpickler(file, encoding="latin1").load()
    except Exception as error:  # unpickling damaged data may raise nearly any error
        raise InputError(
            f"{path}: not a readable pickle of numpy arrays ({_one_line(error)}); download it again, "
            "or save the weights as a .pth file with torch.save(state_dict)"
        ) from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds a {type(data).__name__} instead of a dict of weights")
    return data


class CoDETRCheckpointer(DetectionCheckpointer):
    """detectron2's checkpointer with atomic writes, safe reads and clear errors.

    Reads checkpoints of this project and of detectron2, the published Co-DETR weights, and files that hold a backbone
    only (with its names as they are in the model, or as in the backbone alone). Where a training checkpoint holds a
    moving average ("ema") and only weights are asked for, the averaged ones are loaded: they are the ones to use.

    Raises:
        InputError: from ``load`` and ``resume_or_load``, for a file that is missing, truncated, unsafe, or of another
            model.
    """

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
        self.logger.info("Saving checkpoint to %s", path)
        atomic_write(path, lambda file: torch.save(data, file))
        self.tag_last_checkpoint(f"{name}.pth")

    def tag_last_checkpoint(self, last_filename_basename: str) -> None:
        path = os.path.join(self.save_dir, "last_checkpoint")
        atomic_write(path, lambda file: file.write(last_filename_basename.encode()))

    def load(self, path: str, checkpointables: list[str] | None = None) -> dict:
        wanted = self.checkpointables if checkpointables is None else checkpointables
        self._use_average = not wanted  # a resumed run without an average goes on with the weights themselves
        self._path = path
        file = path.split("?")[0]
        if file and "://" not in file and not os.path.isfile(file):
            raise InputError(f"{file}: no such checkpoint; mend MODEL.WEIGHTS, or the name in the file last_checkpoint")
        return super().load(path, checkpointables)

    def _load_file(self, filename: str) -> dict:
        if filename.endswith(".pkl"):
            data = load_numpy_pickle(filename)
            if "model" in data and "__author__" in data:
                return data
            data = data.get("blobs", data)
            weights = {k: v for k, v in data.items() if isinstance(v, np.ndarray) and not k.endswith("_momentum")}
            return {"model": weights, "__author__": "Caffe2", "matching_heuristics": True}
        return super()._load_file(filename)

    def _torch_load(self, filename: str) -> dict:
        try:
            data = torch.load(filename, map_location="cpu", weights_only=True)
        except Exception as error:  # damaged data may raise nearly any error
            # torch refuses objects of an intact archive with UnpicklingError; legacy files are no archives.
            if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).replace(" ", "_").lower():
                refused = re.findall(r"GLOBAL (\S+)", str(error)) or ["an unknown kind"]
                if zipfile.is_zipfile(filename) or refused != ["an unknown kind"]:
                    raise InputError(
                        f"{filename}: holds Python objects beside tensors ({refused[0]}), which are not loaded because "
                        "that could run code; where the file was made, save the state dict alone"
                    ) from None
            raise InputError(
                f"{filename}: truncated, damaged, or not a PyTorch checkpoint ({_one_line(error)}); copy or download "
                "it again, or resume from an older one by writing its name into the file last_checkpoint"
            ) from None
        if not isinstance(data, dict):
            raise InputError(f"{filename}: holds a {type(data).__name__} instead of a dict of weights")
        if "model" not in data and isinstance(data.get("state_dict"), dict):
            data["model"] = data.pop("state_dict")
        return data

    def _load_model(self, checkpoint: dict):
        weights = checkpoint["model"]
        if not isinstance(weights, dict) or not weights or not all(hasattr(v, "shape") for v in weights.values()):
            raise InputError(f"{self._path}: holds no dict of named tensors, so it is no checkpoint of a model")
        if self._use_average and "ema" in checkpoint:
            weights.update(checkpoint.pop("ema"))
        if published.is_published(weights):
            weights, unused = published.published_to_codetr(weights)
            if unused:
                self.logger.info(
                    "%d tensors of the published model are not used: %s", len(unused), _brief(list(unused))
                )
        own = set(self.model.state_dict())
        prefix = _backbone_prefix(weights, own)
        if prefix:
            weights = {prefix + key: value for key, value in weights.items()}
        checkpoint["model"] = weights
        names = list(weights)
        takes_what_fits = checkpoint.get("matching_heuristics", False)

        incompatible = super()._load_model(checkpoint)
        if incompatible.incorrect_shapes and not takes_what_fits:
            self._raise_incorrect_shapes(incompatible.incorrect_shapes)
        if not self._loaded(incompatible):
            raise InputError(
                f"{self._path}: no tensor of it belongs to this model: it has {_brief(names)}; the model has "
                f"{_brief(sorted(own))}"
            )
        return incompatible

    def _loaded(self, incompatible) -> list[str]:
        """Names of the model's tensors that came from the file."""
        left_out = {*incompatible.missing_keys, *(key for key, _, _ in incompatible.incorrect_shapes)}
        # torch makes up a counter of batches where a file has none.
        return [k for k in self.model.state_dict() if k not in left_out and not k.endswith("num_batches_tracked")]

    def _raise_incorrect_shapes(self, incorrect: list[tuple[str, tuple, tuple]]) -> None:
        key, in_file, in_model = incorrect[0]
        option = next(option for pattern, option in _OPTION_OF_SHAPE if re.search(pattern, key))
        others = (
            f" (and {len(incorrect) - 1} more: {_brief([k for k, _, _ in incorrect[1:]])})" if incorrect[1:] else ""
        )
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
                self.logger.warning("%d %s: %s", len(keys), what, _brief(keys))


def _backbone_prefix(weights: dict, own: set[str]) -> str:
    """The prefix that turns the names of a bare backbone into those of the model, "" where none is needed or fits."""
    if any(key in own or key.removeprefix("module.") in own for key in weights):
        return ""
    prefixes = Counter()
    for name in own:
        if name.startswith("backbone."):
            parts = name.split(".")
            for i in range(1, len(parts)):
                if ".".join(parts[i:]) in weights:
                    prefixes[".".join(parts[:i]) + "."] += 1
    return prefixes.most_common(1)[0][0] if prefixes else ""


def _brief(names: list[str], shown: int = 4) -> str:
    return ", ".join(names[:shown]) + (f", ... ({len(names)} in all)" if len(names) > shown else "")


def _one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
