"""Deformable attention in a process that has the compiled library, and nothing of this package's Python."""

import subprocess
import sys

import torch

from codetr_d2.ops import ms_deform_attn_eager
from tests.ops.common import PACKAGE, make_inputs, needs_cpp

SCRIPT = """
import sys, torch
library, inputs, outputs = sys.argv[1:]
torch.ops.load_library(library)
calls = torch.load(inputs)
torch.save([torch.ops.codetr_d2.ms_deform_attn(*call) for call in calls], outputs)
try:
    value, shapes, locations, weights, _ = calls[-1]
    torch.ops.codetr_d2.ms_deform_attn(value[:, 1:], shapes, locations, weights, "eager")
except RuntimeError as error:
    assert "tokens" in str(error) or "exceeds" in str(error), error
else:
    raise AssertionError("a token is missing")
assert not any(name.startswith("codetr_d2") for name in sys.modules)

import codetr_d2.ops  # a program that was started without the package may import it later
for expected, call in zip(torch.load(outputs), calls):
    assert torch.allclose(torch.ops.codetr_d2.ms_deform_attn(*call), expected, rtol=1e-2, atol=1e-2)
"""


@needs_cpp
def test_the_library_alone_has_the_operator(tmp_path):
    """By its kernels, and where these don't compute it (float16; "eager" is asked for) by ATen."""
    inputs = make_inputs([(4, 6), (3, 2), (1, 1)])
    inputs[2][0, 0] = float("nan")
    empty = make_inputs([(0, 3), (2, 2)], queries=0)
    calls = [(*empty, "auto"), (*empty, "eager")]
    for dtype, backend in (
        (torch.float32, "auto"),
        (torch.float64, "cpp"),
        (torch.float64, "eager"),
        (torch.float16, "auto"),
    ):
        calls.append((*(x.to(dtype) if isinstance(x, torch.Tensor) else x for x in inputs), backend))
    torch.save(calls, tmp_path / "inputs.pt")
    command = [sys.executable, "-W", "error::UserWarning", "-c", SCRIPT]
    paths = [str(next(PACKAGE.glob("_C.*"))), str(tmp_path / "inputs.pt"), str(tmp_path / "outputs.pt")]
    done = subprocess.run([*command, *paths], cwd=PACKAGE.parent, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for (*call, _), output in zip(calls, torch.load(tmp_path / "outputs.pt")):
        tolerance = {torch.float16: 2e-3, torch.float32: 1e-5, torch.float64: 1e-12}[output.dtype]
        torch.testing.assert_close(output, ms_deform_attn_eager(*call), rtol=tolerance, atol=tolerance)
