"""Every kind of model exported. test_quick_start.py exports a model that was trained."""

import os
import shutil
from types import SimpleNamespace

import pytest
import torch

from benchmarks.runtimes import in_runtime
from codetr_d2.export.torch_program import compile_program, export_program, program_session, program_sizes
from tests.exported_model import KINDS, ONE_LAYER, check_kind, lively
from tests.ops.common import needs_cpp
from tests.small_model import build
from tests.torch_program import (
    BATCHES,
    SMALLEST,
    assert_lines,
    assert_same,
    detections,
    metadata,
    random_batch,
    run_demo,
)

pytestmark = pytest.mark.slow

needs_compiler = pytest.mark.skipif(shutil.which(os.environ.get("CXX", "g++")) is None, reason="needs a C++ compiler")


@pytest.mark.parametrize("kind", KINDS)
def test_detections_are_the_models_at_any_size_and_in_a_batch(kind, tmp_path):
    check_kind(kind, tmp_path)


@needs_cpp
@needs_compiler
def test_torch_program_that_is_compiled_ahead_of_time(tmp_path):
    """At other sizes and numbers of pictures; then in a process without this package. Compiling takes minutes."""
    model = build(*SMALLEST, aux_heads=()).eval()
    program = export_program(model, "BGR")
    compile_program(program, tmp_path / "compiled.pt2", metadata(program_sizes(model)))
    loaded = torch._inductor.aoti_load_package(str(tmp_path / "compiled.pt2"))
    for size, sizes in BATCHES:
        images, image_sizes = random_batch(size, sizes)
        expected = detections(model, images, image_sizes, "BGR")
        assert_same(loaded(images, image_sizes), expected)
        # As the gate runs it, from pictures whose channels are last.
        rows = images.permute(0, 2, 3, 1).contiguous()
        found = program_session(loaded, program_sizes(model))({"images": rows.numpy(), "sizes": image_sizes.numpy()})
        assert_same([torch.from_numpy(found[name]) for name in ("boxes", "scores", "classes")], expected)
    lines, images = run_demo(tmp_path / "compiled.pt2", tmp_path)
    assert_lines(lines, detections(model, images, torch.tensor([[150, 188]]), "BGR"))


def test_the_benchmark_runs_what_is_exported():
    """In OpenVINO with the project's deformable attention, in int8: near what the model predicts."""
    cfg = SimpleNamespace(INPUT=SimpleNamespace(FORMAT="RGB"))
    model = lively(build(*ONE_LAYER, aux_heads=()))
    batch = [{"image": torch.randint(256, (3, 128, 128)).float()}]
    detector = in_runtime(model, "int8", cfg, batch)
    with torch.no_grad():
        expected, found = model(batch)[0]["instances"], detector(batch)[0]["instances"]
    assert 0 < (expected.scores[:20] - found.scores[:20]).abs().mean() < 0.1
