"""Deformable attention of an OpenVINO model by the project's operator: as its own operators compute it."""

import nncf
import numpy as np
import openvino
import pytest
import torch

from codetr_d2.export.openvino import ADVANCED, QUANTIZATION, write_openvino
from codetr_d2.inference.openvino_session import MSDeformAttn, with_own_attention
from codetr_d2.ops import ms_deform_attn
from tests.exported_model import export, lively
from tests.ops.common import needs_cpp
from tests.small_model import build
from tests.torch_program import SMALLEST

INPUTS = {"images": np.random.default_rng(0).integers(256, size=(2, 131, 177, 3), dtype=np.uint8)}
INPUTS["sizes"] = np.array([[131, 150], [96, 177]])


@pytest.fixture(scope="module")
def file(tmp_path_factory):
    folder = tmp_path_factory.mktemp("model")
    export(lively(build(*SMALLEST, aux_heads=())), folder / "model.onnx", postprocess="none")
    return write_openvino(folder / "model.onnx", folder)


def run(model):
    """The raw predictions, and the types of the operators that were run."""
    compiled = openvino.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32", "PERF_COUNT": True})
    request = compiled.create_infer_request()
    found = request.infer(INPUTS)
    return [torch.from_numpy(found[i].copy()) for i in range(2)], {x.node_type for x in request.get_profiling_info()}


def test_in_float32(file):
    expected, types = run(openvino.Core().read_model(file))
    assert "GridSample" in types
    model = openvino.Core().read_model(file)
    assert with_own_attention(model) == 2  # of the encoder's layer and the decoder's
    found, types = run(model)
    assert "GridSample" not in types
    torch.testing.assert_close(found, expected, rtol=0, atol=1e-5)


def test_in_int8(file):
    """The roundings stay where they are."""
    data = nncf.Dataset([INPUTS])
    quantized = nncf.quantize(openvino.Core().read_model(file), data, advanced_parameters=ADVANCED, **QUANTIZATION)
    expected, _ = run(quantized)
    assert with_own_attention(quantized) == 2
    roundings = [x for x in quantized.get_ordered_ops() if x.get_type_name() == "FakeQuantize"]
    assert len([x for x in roundings if x.input_value(0).get_node().get_type_name() == "MSDeformAttn"]) == 2
    found, types = run(quantized)
    assert "GridSample" not in types
    for x, y in zip(found, expected):  # a value on the edge between two whole numbers may fall to either
        assert (x - y).abs().mean() < 0.02 * y.std()


def test_other_sampling_stays():
    maps, grid = (openvino.opset13.parameter([1, *shape], np.float32) for shape in ((4, 8, 8), (5, 5, 2)))
    sampled = openvino.opset13.grid_sample(maps, grid, {})
    model = openvino.Model([openvino.opset13.relu(sampled)], [maps, grid])
    assert with_own_attention(model) == 0


@needs_cpp
def test_operator():
    value, locations = torch.randn(2, 4 * 5 + 2 * 3, 3, 8), torch.rand(2, 7, 3, 2, 4, 2)
    weights, sizes = torch.rand(2, 7, 3, 2, 4), torch.tensor([4, 5, 2, 3])
    tensors = value, sizes, locations, weights
    inputs = [openvino.opset13.parameter([-1] * x.dim(), x.numpy().dtype) for x in tensors]
    model = openvino.Model([MSDeformAttn([x.output(0) for x in inputs])], inputs)
    [found] = openvino.compile_model(model, "CPU")([x.numpy() for x in tensors]).values()
    expected = ms_deform_attn(value, [(4, 5), (2, 3)], locations, weights)
    torch.testing.assert_close(torch.from_numpy(found), expected)
