"""What the tests of the operators share: inputs, and processes with a setting of their own."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import torch

import codetr_d2
from codetr_d2.ops import ms_deform_attn
from codetr_d2.ops.library import library_is_loaded

PACKAGE = Path(codetr_d2.__file__).parent
needs_cpp = pytest.mark.skipif(not library_is_loaded(), reason="needs the compiled library, which is not there")


def make_inputs(shapes, batch=2, queries=7, heads=3, head_dim=8, points=4, dtype=torch.float32, seed=0):
    """Inputs of the operator. Locations lie inside, on border cells and outside, away from the kinks of the weights."""
    generator = torch.Generator().manual_seed(seed)

    def rand(*size):
        return torch.rand(size, generator=generator, dtype=torch.float64)

    spatial_shapes = torch.tensor(shapes, dtype=torch.int64).reshape(-1, 2)
    sizes = spatial_shapes.prod(1)
    width_height = spatial_shapes.flip(1)[:, None].double()
    points_shape = (batch, queries, heads, len(shapes), points)
    cells = (rand(*points_shape, 2) * (width_height + 4)).floor() - 2  # from -2 to size + 1
    locations = (cells + 0.1 + 0.8 * rand(*points_shape, 2) + 0.5) / width_height.clamp(min=1)
    value = rand(batch, int(sizes.sum()), heads, head_dim) * 2 - 1
    weights = rand(*points_shape) - 0.3
    return value.to(dtype), spatial_shapes.flatten().tolist(), locations.to(dtype), weights.to(dtype)


def call_function(value, spatial_shapes, *others):
    """:func:`ms_deform_attn`, with the sizes as the operator takes them."""
    return ms_deform_attn(value, list(zip(spatial_shapes[::2], spatial_shapes[1::2])), *others)


def change_floats(inputs, change):
    """The inputs with ``change`` applied to the tensors, all of which are of floating point."""
    return [change(x) if isinstance(x, torch.Tensor) else x for x in inputs]


def run(function, inputs, grad_output=None):
    """The output of ``function``, and its gradients of value, locations and weights."""
    value, shapes, locations, weights = inputs
    leaves = [x.detach().requires_grad_() for x in (value, locations, weights)]
    output = function(leaves[0], shapes, *leaves[1:])
    output.backward(torch.ones_like(output) if grad_output is None else grad_output.to(output.dtype))
    return output.detach(), *(x.grad for x in leaves)


def run_copy(folder, script, library, **environment):
    """Run ``script`` in a new process, with a copy of ``codetr_d2.ops`` alone that has the compiled library or not."""
    package = folder / "codetr_d2"
    shutil.copytree(PACKAGE / "ops", package / "ops", ignore=shutil.ignore_patterns("__pycache__"))
    for file in [PACKAGE / "errors.py", *(PACKAGE.glob("_C.*") if library else [])]:
        shutil.copy(file, package)
    (package / "__init__.py").touch()  # the other rooms take long to import and don't matter here
    inherited = {name: value for name, value in os.environ.items() if name != "CODETR_D2_NO_CPP"}
    environment = {**inherited, "PYTHONPATH": str(folder), **environment}
    command = [sys.executable, "-c", script]
    result = subprocess.run(command, env=environment, cwd=folder, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr
