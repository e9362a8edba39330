import os
import platform
import re
import subprocess
import sys
from pathlib import Path

import pytest
import scipy
import timm
import torch

import codetr_d2
from codetr_d2.collect_env import collect_env_info, compiler_version, package_version
from codetr_d2.ops import active_backend

ROOT = Path(__file__).parents[1]


def value(report: str, name: str) -> str:
    """What the report's table says about ``name``."""
    return re.search(rf"^{re.escape(name)} {{2,}}(.*)$", report, re.MULTILINE)[1].strip()


def test_report_states_the_installed_versions():
    report = collect_env_info()
    assert value(report, "codetr_d2").startswith(codetr_d2.__version__)
    assert value(report, "PyTorch").startswith(torch.__version__)
    assert value(report, "scipy") == scipy.__version__
    assert value(report, "timm") == timm.__version__
    assert value(report, "triton") == package_version("triton")
    assert f"torch uses {torch.get_num_threads()} threads" in value(report, "CPU")
    assert value(report, "detectron2")


def test_report_tells_the_active_backend_and_why():
    backend, reason = active_backend("cpu")
    assert value(collect_env_info(), "deformable attention on cpu") == f"{backend}: {reason}"


def test_report_tells_the_backend_on_a_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    monkeypatch.setattr("codetr_d2.collect_env.detectron2_env_info", lambda: "")  # would ask the GPU more
    monkeypatch.setattr("codetr_d2.collect_env.active_backend", lambda device: ("triton", f"kernels on {device}"))
    monkeypatch.setattr("codetr_d2.collect_env.fast_bfloat16", lambda device: (device == "cuda", f"like any {device}"))
    report = collect_env_info()
    assert value(report, "deformable attention on cuda") == "triton: kernels on cuda"
    assert value(report, "inference on cuda") == "bfloat16: like any cuda"
    assert value(report, "inference on cpu") == "float32: like any cpu"


def test_missing_package_and_compiler_are_reported(monkeypatch, tmp_path):
    assert package_version("no-such-distribution") == "not installed"
    monkeypatch.setenv("CXX", str(tmp_path / "no-compiler"))
    assert "no-compiler not found" in compiler_version()
    monkeypatch.setenv("CXX", sys.executable)
    assert compiler_version() == f"Python {platform.python_version()}"


@pytest.mark.slow
def test_missing_detectron2_is_named_with_the_command_that_mends_it(tmp_path):
    # A module whose import fails as an absent one does, found before the installed detectron2.
    (tmp_path / "detectron2.py").write_text(
        "raise ModuleNotFoundError('No module named detectron2', name='detectron2')"
    )
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(tmp_path), str(ROOT)])}
    command = [sys.executable, "-m", "codetr_d2.collect_env"]
    result = subprocess.run(command, cwd=tmp_path, env=environment, capture_output=True, text=True)
    assert result.returncode != 0
    assert "needs detectron2" in result.stderr and "codetr_d2 install-detectron2 (" in result.stderr
