"""Read checkpoint files of strangers without running anything that they hold."""

import pickle
import re
import zipfile
from collections import OrderedDict
from typing import Any

import numpy as np
import torch
from torch.serialization import get_unsafe_globals_in_checkpoint, safe_globals

from ..errors import InputError
from .other_files import is_safetensors, what_else

__all__ = ["load_numpy_pickle", "load_torch", "one_line", "weights_entry"]


def _encode_latin1(text: str, encoding: str) -> bytes:
    if encoding != "latin1":
        raise pickle.UnpicklingError(f"encoding {encoding}")
    return text.encode("latin1")


# Codes of the numpy types that are read: truth values and numbers, in the byte order of the machine or marked.
_NUMBER = re.compile(r"[<=|]?(b1|[fiu][1248])")


class _PickledDtype:
    """Stands in for ``numpy.dtype`` in a pickle: keeps the code, and takes no other state than that of a plain type.

    Never the real one: what numpy lets a pickle set in it can turn bytes into pointers.
    """

    def __init__(self, code: Any, *flags: Any):
        if not (isinstance(code, (str, bytes)) and _NUMBER.fullmatch(code if isinstance(code, str) else code.decode())):
            raise pickle.UnpicklingError(f"a numpy type {code!r}")
        self.code = code if isinstance(code, str) else code.decode()

    def __setstate__(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) > 1 and state[1] in ("<", "=", "|", b"<", b"=", b"|")):
            raise pickle.UnpicklingError("a numpy type of another byte order")


class _PickledArray:
    """Stands in for ``numpy.ndarray`` in a pickle, until :func:`_to_numpy` makes an array of it."""

    array: np.ndarray | None = None

    def __setstate__(self, state: Any) -> None:
        if not (isinstance(state, tuple) and len(state) == 5 and isinstance(state[2], _PickledDtype)):
            raise pickle.UnpicklingError("a numpy array of an unknown kind")
        _, shape, dtype, is_fortran, data = state
        data = data.encode("latin1") if isinstance(data, str) else data
        values = np.frombuffer(data, dtype.code)
        self.array = values.reshape(shape, order="F" if is_fortran else "C").copy()


def _pickled_scalar(dtype: Any, data: Any) -> float:
    if not isinstance(dtype, _PickledDtype):
        raise pickle.UnpicklingError("a numpy number of an unknown kind")
    return np.frombuffer(data.encode("latin1") if isinstance(data, str) else data, dtype.code, count=1)[0].item()


class _NumpyUnpickler(pickle.Unpickler):
    """Reads numpy arrays of numbers in plain containers and refuses anything else."""

    _ALLOWED = {
        "numpy.ndarray": _PickledArray,
        "numpy.dtype": _PickledDtype,
        "numpy.core.multiarray._reconstruct": lambda *args: _PickledArray(),
        "numpy.core.multiarray.scalar": _pickled_scalar,
        "collections.OrderedDict": dict,
        "_codecs.encode": _encode_latin1,  # how Python 3 writes bytes in pickles of protocol 2
        "__builtin__.bytes": lambda: b"",  # and no bytes
    }

    def find_class(self, module: str, name: str):
        known = self._ALLOWED.get(f"{module.replace('numpy._core', 'numpy.core')}.{name}")
        if known is None:
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return known


def _to_numpy(value: Any, seen: dict[int, Any]) -> Any:
    """The same containers with arrays in the place of their stand-ins."""
    if isinstance(value, _PickledArray):
        if value.array is None:
            raise pickle.UnpicklingError("a numpy array without content")
        return value.array
    if type(value) in (dict, list, tuple):
        if id(value) not in seen:
            seen[id(value)] = None  # a container inside of itself
            if isinstance(value, dict):
                seen[id(value)] = {key: _to_numpy(item, seen) for key, item in value.items()}
            else:
                seen[id(value)] = type(value)(_to_numpy(item, seen) for item in value)
        return seen[id(value)]
    return value


def load_numpy_pickle(path: str) -> dict:
    """Read a ``.pkl`` file of detectron2's model zoo: numpy arrays in dicts, lists and tuples.

    Raises:
        InputError: the file is truncated, is no pickle, or holds anything else, which is not executed.
    """
    try:
        with open(path, "rb") as file:
            data = _to_numpy(_NumpyUnpickler(file, encoding="latin1").load(), {})
    except Exception as error:  # unpickling damaged data may raise nearly any error
        if answer := what_else(path):
            raise InputError(f"{path}: {answer}") from None
        raise InputError(
            f"{path}: not a readable pickle of numpy arrays ({one_line(error)}); download it again, "
            "or save the weights as a .pth file with torch.save(state_dict)"
        ) from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds a {type(data).__name__} instead of a dict of weights")
    return data


class _Inert:
    """What stands in for an object of a class that is not loaded: takes what the file says of it, and drops it."""

    def __new__(cls, *args):
        return super().__new__(cls)

    def __init__(self, *args):
        super().__init__()

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        raise pickle.UnpicklingError(
            f"Can only SETITEM for dict, but got {type(self)}"
        )  # as newer versions of torch do


class _InertMapping:
    """What stands in for a kind of dict: a plain one, because torch sets items of nothing else."""

    def __new__(cls, *args):
        return OrderedDict()


class _InertList:
    """What stands in for a kind of list: a plain one, because torch appends to nothing else."""

    def __new__(cls, *args):
        return []


class _Dtype(_Inert):
    """Stands in for a numpy type: keeps its code, like "f8"."""

    def __init__(self, code: str = "", *args):
        super().__init__()
        self.code = str(code)


class _Scalar(_Inert):
    """Stands in for a number of numpy, which a plain one replaces."""

    def __new__(cls, dtype: Any = None, data: Any = None):
        if isinstance(dtype, _Dtype) and re.fullmatch("b1|[fiu][1248]", dtype.code) and isinstance(data, bytes):
            return np.frombuffer(data, f"<{dtype.code}", count=1)[0].item()
        return super().__new__(cls)


_NUMPY = {
    "numpy.dtype": _Dtype,
    "numpy.core.multiarray.scalar": _Scalar,
    "numpy._core.multiarray.scalar": _Scalar,
}


def load_torch(path: str) -> tuple[dict, list[str]]:
    """Read a file of ``torch.save`` on the CPU, with ``weights_only``; or one of safetensors.

    Checkpoints of other frameworks describe their training in objects of their own classes. Nothing is imported or
    called for them: an object that does nothing is read in their place, and then left out. Kinds of dict and list, and
    numbers of numpy, become plain ones.

    Returns:
        The content, and what was left out, like ``"meta.history (mmcv.HistoryBuffer)"``.

    Raises:
        InputError: the file is truncated, is no checkpoint, holds no dict, asks for functions of the operating system,
            or has such an object in the place of a weight.
    """
    if is_safetensors(path):
        return _load_safetensors(path), []
    unknown: dict[str, type] = {}  # what the file asks for -> its stand-in
    try:
        if zipfile.is_zipfile(path):  # otherwise the weights might be read before the first unknown name is met
            unknown = {name: _stand_in_class(name) for name in get_unsafe_globals_in_checkpoint(path)}
        while True:
            try:
                with safe_globals([(stand_in, name) for name, stand_in in unknown.items()]):
                    data = torch.load(path, map_location="cpu", weights_only=True)
                break
            except pickle.UnpicklingError as error:
                more = {name: _stand_in_class(name) for name in _unknown_globals(error) - unknown.keys()}
                # torch names the class where an item is set or appended: it is a kind of dict or of list.
                match = re.search(
                    r"Can only (SETITEMS? for|append to|extend) .*but got <class '\S*safe_load\.(\S+)'>", str(error)
                )
                if match and issubclass(unknown.get(match[2], _InertMapping), _Inert):
                    kind = _InertMapping if match[1].startswith("SETITEM") else _InertList
                    more[match[2]] = type(match[2], (kind,), {})
                if not more:
                    raise
                unknown |= more
        dropped: list[str] = []
        if unknown:
            data = _without_stand_ins(data, "", dropped, {})
    except Exception as error:  # damaged data may raise nearly any error
        if answer := what_else(path):
            raise InputError(f"{path}: {answer}") from None
        # torch refuses objects of an intact archive with UnpicklingError; legacy files are no archives.
        if isinstance(error, pickle.UnpicklingError) and "weights_only" in str(error).replace(" ", "_").lower():
            refused = re.findall(r"GLOBAL (\S+)", str(error)) or sorted(unknown) or ["an unknown kind"]
            if zipfile.is_zipfile(path) or refused != ["an unknown kind"]:
                raise InputError(
                    f"{path}: holds Python objects beside tensors ({refused[0]}), which are not loaded because "
                    "that could run code; where the file was made, save the state dict alone"
                ) from None
        reason = one_line(error)
        if "weights_only" in reason:  # torch's advice, to read the file without any check, is not ours
            reason = "it begins like none"
        raise InputError(
            f"{path}: truncated, damaged, or not a PyTorch checkpoint ({reason}); copy or download "
            "it again, or resume from an older one by writing its name into the file last_checkpoint"
        ) from None
    if not isinstance(data, dict):
        raise InputError(f"{path}: holds a {type(data).__name__} instead of a dict of weights")
    entry = weights_entry(data)
    for name in dropped:
        if entry and name.startswith(f"{entry}."):
            raise InputError(f"{path}: {name} is a Python object where a weight should be; the file is not used")
    return data, dropped


def _load_safetensors(path: str) -> dict:
    try:
        from safetensors.torch import load_file
    except ImportError:
        raise InputError(
            f"{path}: a safetensors file, to read which a package is missing: pip install safetensors"
        ) from None
    try:
        return load_file(path)
    except Exception as error:  # its own class of errors, and those of the file
        raise InputError(
            f"{path}: a truncated or damaged safetensors file ({one_line(error)}); copy it again"
        ) from None


def weights_entry(data: dict) -> str:
    """The entry of a checkpoint that holds its weights by name, "" where the checkpoint is nothing but these."""
    return next((key for key in ("model", "state_dict", "module") if isinstance(data.get(key), dict)), "")


def _stand_in_class(name: str) -> type:
    return _NUMPY.get(name) or type(name, (_Inert,), {})


def _unknown_globals(error: Exception) -> set[str]:
    """The first name that an older file, which is no archive, asks for and torch does not allow."""
    names = re.findall(r"Unsupported global: GLOBAL (\S+) was not", str(error))
    return {name if "." in name else f"builtins.{name}" for name in names}


def _stand_in(value: Any) -> str:
    """What a value stands in for, "" where it is none."""
    kind = value if isinstance(value, type) else type(value)
    return kind.__name__ if issubclass(kind, (_Inert, _InertMapping, _InertList)) else ""


def _without_stand_ins(value: Any, path: str, dropped: list[str], seen: dict[int, Any]) -> Any:
    """The same containers without the stand-ins in them, whose places are added to ``dropped``.

    ``seen`` has what became of each container: one that stands in several places is looked at once.
    """
    if id(value) in seen:
        return seen[id(value)]
    if isinstance(value, dict):
        kept = seen[id(value)] = type(value)()
        for key, item in value.items():
            place = f"{path}.{key}" if path else str(key)
            if stand_in := _stand_in(item) or _stand_in(key):
                dropped.append(f"{place} ({stand_in})")
            else:
                kept[key] = _without_stand_ins(item, place, dropped, seen)
        if hasattr(value, "_metadata"):  # of a state dict
            kept._metadata = _without_stand_ins(value._metadata, f"{path}._metadata", dropped, seen)
        return kept
    if type(value) in (list, tuple, set):
        kept = []
        for i, item in enumerate(value):
            if stand_in := _stand_in(item):
                dropped.append(f"{path}[{i}] ({stand_in})")
            else:
                kept.append(_without_stand_ins(item, f"{path}[{i}]", dropped, seen))
        seen[id(value)] = type(value)(kept)
        return seen[id(value)]
    return value


def one_line(error: Exception) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0]
