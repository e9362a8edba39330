"""What of a model is put into int8."""

import nncf
import numpy as np
import openvino
from openvino import opset13 as ops

from codetr_d2.export.openvino import ADVANCED, QUANTIZATION


def rounded_inputs(**options):
    """The types of what reads values that were rounded to int8, in a model whose last step clips boxes."""
    features = ops.parameter([-1, 64], np.float32)
    weight = ops.constant(np.random.default_rng(0).normal(size=(64, 4)).astype(np.float32))
    boxes = ops.matmul(features, weight, False, False)
    boxes = ops.minimum(ops.maximum(boxes, np.float32(0)), ops.abs(boxes))
    data = nncf.Dataset([np.random.default_rng(i).normal(size=(8, 64)).astype(np.float32) for i in range(3)])
    model = nncf.quantize(openvino.Model([boxes], [features]), data, advanced_parameters=ADVANCED, **options)
    roundings = [x for x in model.get_ops() if x.get_type_name() == "FakeQuantize"]
    return {user.get_node().get_type_name() for x in roundings for user in x.output(0).get_target_inputs()}


def test_products_are_in_int8_and_boxes_are_not():
    assert rounded_inputs(**QUANTIZATION) == {"MatMul"}
    # What that is for.
    assert "Minimum" in rounded_inputs(model_type=QUANTIZATION["model_type"])
