"""The packages that exporting needs beyond those of the model."""

import importlib.util

from ..errors import InputError

__all__ = ["check_packages"]

_PACKAGES = {
    "onnx": ["onnxscript", "onnxruntime"],
    "openvino": ["onnxscript", "openvino"],
    "torch": [],
    "int8": ["onnxscript", "openvino", "nncf"],
}


def check_packages(kind: str) -> None:
    """Check that what an export needs is installed.

    Args:
        kind: ``onnx``, ``openvino`` or ``int8``.

    Raises:
        InputError: something is missing; with the command that installs it.
    """
    missing = [name for name in _PACKAGES[kind] if importlib.util.find_spec(name) is None]
    if missing:
        raise InputError(
            f"{' and '.join(missing)} {'is' if len(missing) == 1 else 'are'} not installed, which exporting needs: run "
            f"`python -m pip install {' '.join(missing)}`"
        )
