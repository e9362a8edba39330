"""``python -m codetr_d2.collect_env``: what a bug report needs to say about the installation."""

import importlib.metadata
import os
import platform
import shutil
import subprocess
from pathlib import Path

import torch
from detectron2.utils.collect_env import collect_env_info as detectron2_env_info
from tabulate import tabulate

from . import __version__
from .ops import active_backend, fast_bfloat16

__all__ = ["collect_env_info"]

PACKAGES = ["triton", "scipy", "timm", "pycocotools", "matplotlib"]
PACKAGES += ["opencv-python-headless", "opencv-python", "setuptools"]


def package_version(name: str) -> str:
    """The version of an installed distribution, or that there is none."""
    try:
        return importlib.metadata.version(name)
    except importlib.metadata.PackageNotFoundError:
        return "not installed"


def compiler_version() -> str:
    """The C++ compiler that setup.py would build the operator with, as PyTorch chooses it."""
    compiler = os.environ.get("CXX", "c++")
    if shutil.which(compiler) is None:
        return f"none ({compiler} not found)"
    result = subprocess.run([compiler, "--version"], capture_output=True, text=True)
    return next(iter(result.stdout.splitlines()), f"{compiler} does not tell its version")


def collect_env_info() -> str:
    """Versions, threads, what computes deformable attention and in what inference computes, and why; and then
    detectron2's own report.
    """
    devices = ["cpu"] + (["cuda"] if torch.cuda.is_available() else [])
    rows = [("codetr_d2", f"{__version__} @{Path(__file__).parent}")]
    for device in devices:
        backend, reason = active_backend(device)
        rows.append((f"deformable attention on {device}", f"{backend}: {reason}"))
        is_fast, reason = fast_bfloat16(device)
        rows.append((f"inference on {device}", f"{'bfloat16' if is_fast else 'float32'}: {reason}"))
    rows += [
        ("C++ compiler", compiler_version()),
        ("CPU", f"{platform.machine()}, {os.cpu_count()} cores; torch uses {torch.get_num_threads()} threads"),
        ("OMP_NUM_THREADS", os.environ.get("OMP_NUM_THREADS", "<not set>")),
    ]
    rows.append(("detectron2 distribution", package_version("detectron2")))  # detectron2's own report lacks its build
    rows += [(name, package_version(name)) for name in PACKAGES]
    return f"{tabulate(rows)}\n{detectron2_env_info()}"


if __name__ == "__main__":
    print(collect_env_info())
