"""The compiled library that ``setup.py`` builds: the operators for the CPU."""

import os
import sys
from pathlib import Path

import torch

__all__ = ["BUILD_COMMAND", "library_is_loaded", "library_problem"]

BUILD_COMMAND = f"{sys.executable} -m pip install --no-build-isolation --no-deps -e ."


_LEFT_OUT = "CODETR_D2_NO_CPP is set, so its C++ library is left out"


def _load() -> str:
    if os.environ.get("CODETR_D2_NO_CPP", "0") not in ("", "0"):  # as setup.py reads it
        return _LEFT_OUT
    libraries = sorted(Path(__file__).parents[1].glob("_C.*"))
    if not libraries:
        return "its C++ library is not built"
    try:
        torch.ops.load_library(libraries[0])
    except OSError as error:  # built against another PyTorch, or for another machine
        return f"its C++ library can't be loaded ({error})"
    if not hasattr(torch.ops.codetr_d2, "ms_deform_attn"):
        return "its C++ library was built from older sources"
    return ""


_problem = _load()


def library_is_loaded() -> bool:
    """Whether the compiled library is there."""
    return not _problem


def library_problem() -> str:
    """Why the compiled library can't be used and how to mend that, "" if it can."""
    how = f"with a C++ compiler, this command in the project's folder builds it: {BUILD_COMMAND}"
    return _problem if _problem in ("", _LEFT_OUT) else f"{_problem}; {how}"
