"""An exported file in OpenVINO, with deformable attention by this project's own operator.

The file has it in OpenVINO's own operators, so that it runs anywhere. They write out every sampled value, several
times: half of the time that an int8 model takes. Where the project's compiled library is loaded, the model in memory
calls it instead.
"""

import math

import openvino
import torch
from openvino import Dimension, Node, Output, PartialShape
from openvino import opset13 as ops

from ..ops import ms_deform_attn

__all__ = ["MSDeformAttn", "with_own_attention"]


class MSDeformAttn(openvino.Op):
    """:func:`codetr_d2.ops.ms_deform_attn` as an operator of OpenVINO.

    Its inputs are value [B, S, H, D], the levels' sizes [L * 2] int64, height and width in turn, sampling_locations
    [B, Q, H, L, P, 2] and attention_weights [B, Q, H, L, P]; its output is [B, Q, H * D].
    """

    def __init__(self, inputs: list[Output] | None = None):
        super().__init__(self, inputs)

    def validate_and_infer_types(self) -> None:
        value, _, locations, _ = (self.get_input_partial_shape(i) for i in range(4))
        head = value[2], value[3]
        channels = math.prod(x.get_length() for x in head) if all(x.is_static for x in head) else Dimension()
        self.set_output_type(0, self.get_input_element_type(0), PartialShape([value[0], locations[1], channels]))

    def clone_with_new_inputs(self, new_inputs: list[Output]) -> "MSDeformAttn":
        return MSDeformAttn(new_inputs)

    def has_evaluate(self) -> bool:
        return True

    def evaluate(self, outputs: list[openvino.Tensor], inputs: list[openvino.Tensor]) -> bool:
        value, sizes, locations, weights = (torch.from_numpy(x.data) for x in inputs)
        shapes = [tuple(x) for x in sizes.view(-1, 2).tolist()]
        with torch.inference_mode():
            result = ms_deform_attn(value, shapes, locations, weights)
        outputs[0].shape = list(result.shape)
        outputs[0].data[:] = result.numpy()
        return True


def with_own_attention(model: openvino.Model) -> int:
    """Let a model call :class:`MSDeformAttn` wherever it samples as tools/export.py writes deformable attention.

    Args:
        model: changed in place.

    Returns:
        The number of attentions that were replaced.
    """
    ends = {}  # what adds up the levels, and their samplings by level
    for node in model.get_ordered_ops():
        if node.get_type_name() == "GridSample":
            end = _end(node)
            if end is not None:
                ends.setdefault(end.get_friendly_name(), (end, []))[1].append(node)
    return sum(_replace(end, sorted(samplings, key=_level)) for end, samplings in ends.values())


def _replace(end: Node, samplings: list[Node]) -> bool:
    """Put the operator in the place of the sum ``end`` over levels; False where the graph looks otherwise."""
    value, locations = (_before_transpose(samplings[0].input_value(i)) for i in (0, 1))
    weights = _before_transpose(_weights(samplings[0]))
    sizes = [_size(node) for node in samplings]
    found = (value, locations, weights, *sizes)
    if None in found or [x.get_partial_shape().rank.get_length() for x in found[:3]] != [4, 6, 5]:
        return False
    result = MSDeformAttn([value, ops.concat(sizes, 0).output(0), locations, weights]).output(0)
    # From [B * H, D, Q] to [B, Q, H * D]. In an int8 model the sum may first be rounded, with one range for all of it.
    last = end
    while (user := _only_user(last, "FakeQuantize", "Reshape", "Transpose")) is not None:
        if user.get_type_name() == "FakeQuantize":
            ranges = [user.input_value(i).get_node().get_data() for i in range(1, 5)]
            if any(x.size != 1 for x in ranges):
                return False
            ranges = [ops.constant(x.reshape(())) for x in ranges]
            result = ops.fake_quantize(result, *ranges, user.get_attributes()["levels"]).output(0)
        last = user
    for target in last.output(0).get_target_inputs():
        target.replace_source_output(result)
    return True


def _only_user(node: Node | None, *types: str) -> Node | None:
    """What alone reads the node's output, if it is of one of the types."""
    users = [] if node is None else [x.get_node() for x in node.output(0).get_target_inputs()]
    return users[0] if len(users) == 1 and users[0].get_type_name() in types else None


def _end(sampling: Node) -> Node | None:
    """What adds up the levels' weighted samples, one of which is ``sampling``."""
    node = _only_user(_only_user(sampling, "Multiply"), "ReduceSum")
    while (sum_of_levels := _only_user(node, "Add")) is not None:
        node = sum_of_levels
    return node


def _weights(sampling: Node) -> Output:
    """The factor of the samples."""
    product = _only_user(sampling, "Multiply")
    is_first = product.input_value(0).get_node().get_friendly_name() == sampling.get_friendly_name()
    return product.input_value(int(is_first))


def _before_transpose(output: Output) -> Output | None:
    """What the transpose reads that ``output`` is made of."""
    node = output.get_node()
    while node.get_type_name() in ("Add", "Gather", "Multiply", "Reshape", "Slice", "Squeeze", "Subtract"):
        node = node.input_value(0).get_node()
    return node.input_value(0) if node.get_type_name() == "Transpose" else None


def _level(sampling: Node) -> int:
    """Which level a sampling reads: of several, each picks its own points."""
    points = sampling.input_value(1).get_node()
    return int(points.input_value(1).get_node().get_data()) if points.get_type_name() == "Gather" else 0


def _size(sampling: Node) -> Output | None:
    """[2] int64, the level's (height, width): the end of the sizes to which its features are reshaped."""
    features = sampling.input_value(0).get_node()
    if features.get_type_name() != "Reshape":
        return None
    sizes = features.input_value(1).get_node()
    if sizes.get_type_name() == "Constant":
        return ops.constant(sizes.get_data()[-2:]).output(0)
    if sizes.get_type_name() != "Concat":
        return None
    # The first is of the heads and their channels, which must not be computed for their sizes alone.
    others = [sizes.input_value(i) for i in range(1, sizes.get_input_size())]
    size = others[0] if len(others) == 1 else ops.concat(others, 0).output(0)
    return size if list(size.get_shape()) == [2] else None
