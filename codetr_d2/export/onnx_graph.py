"""A model as one ONNX graph, from pictures to detections, for any number and size of pictures."""

import contextlib
import warnings
from collections.abc import Sequence

import numpy as np
import onnx_ir as ir
import torch
from onnx_ir import tape
from torch import Tensor, nn
from torch.export import Dim

from ..inference.exported import PROPOSALS
from ..modeling.meta_arch import CoDETR
from ..modeling.query_heads import TwoStageQueryHead
from .backbones import backbone_stages
from .onnx_operators import OPSET, soft_nms_model, translations
from .parts import Decode, Encode, Finish, Masks, Neck, Preprocess, Select, has_masks

__all__ = ["build_onnx_model"]


class _Graph:
    """An ONNX graph that grows part by part.

    Args:
        inputs: by name their type and shape; strings are sizes that are known at run time only.
    """

    def __init__(self, inputs: dict[str, tuple[ir.DataType, list[int | str]]]):
        values = [
            ir.Value(name=name, type=ir.TensorType(dtype), shape=ir.Shape(shape))
            for name, (dtype, shape) in inputs.items()
        ]
        self.graph = ir.Graph(values, [], nodes=[], opset_imports={"": OPSET}, name="codetr_d2")
        self.model = ir.Model(self.graph, ir_version=10, producer_name="codetr_d2")
        self.num_parts = 0

    @property
    def inputs(self) -> list[ir.Value]:
        return list(self.graph.inputs)

    def add(self, part: nn.Module, args: tuple, dynamic_shapes: tuple, inputs: Sequence[ir.Value]) -> list[ir.Value]:
        """Export a part, and put it behind the values ``inputs``, one for each tensor in ``args``; its outputs."""
        with _quiet(), torch.no_grad():
            program = torch.onnx.export(
                part,
                args,
                dynamic_shapes=dynamic_shapes,
                custom_translation_table=translations(),
                opset_version=OPSET,
                dynamo=True,
                verbose=False,
            )
        return self.take(program.model, inputs)

    def take(self, model: ir.Model, inputs: Sequence[ir.Value]) -> list[ir.Value]:
        """Put a graph behind the values ``inputs``, one for each of its own; its outputs."""
        graph, prefix = model.graph, f"part{self.num_parts}/"
        self.num_parts += 1
        if len(graph.inputs) != len(inputs):
            raise RuntimeError(f"a part has {len(graph.inputs)} inputs in ONNX, and {len(inputs)} in PyTorch")
        outputs = list(graph.outputs)
        graph.outputs.clear()
        given = dict(zip(graph.inputs, inputs))
        for inner, outer in given.items():
            ir.convenience.replace_all_uses_with(inner, outer)
        # The optimizer forgets to list some of the constants that it makes, so what nodes read counts.
        constants = {value: None for value in graph.initializers.values()}
        for i, node in enumerate(graph.all_nodes()):
            node.name = f"{prefix}{node.op_type}_{i}"
            for j, value in enumerate(node.outputs):
                value.name = f"{node.name}_{j}"
                value.shape = None  # the names of its sizes may mean others in another part
            constants.update(
                (value, None) for value in node.inputs if value is not None and value.const_value is not None
            )
        graph.initializers.clear()
        for i, value in enumerate(value for value in constants if value.producer() is None):
            value.name = f"{prefix}{i}/{value.name}"
            self.graph.register_initializer(value)
        nodes = list(graph)
        graph.remove(nodes)
        self.graph.extend(nodes)
        self.model.functions.update(model.functions)
        return [given.get(value, value) for value in outputs]

    def top(self, scores: ir.Value, number: int | None = None, like: ir.Value | None = None) -> ir.Value:
        """[B, M] scores -> [B, N] int64, the indices of the highest, by falling score.

        Args:
            scores: what to choose from.
            number: N, or M where that is less; None: as ``like`` has in its second dimension.
            like: see ``number``.
        """
        nodes = tape.Tape()
        size = nodes.op("Shape", [scores if like is None else like], {"start": 1, "end": 2})
        if number is not None:
            limit = nodes.op("Constant", [], {"value": ir.tensor([number], dtype=ir.DataType.INT64)})
            size = nodes.op("Min", [limit, size])
        _, index = nodes.op_multi_out("TopK", [scores, size], {"axis": 1}, num_outputs=2)
        self._extend(nodes)
        return index

    def flatten(self, value: ir.Value) -> ir.Value:
        """[B, ...] -> [B, the product of the rest]."""
        nodes = tape.Tape()
        flat = nodes.op("Flatten", [value], {"axis": 1})
        self._extend(nodes)
        return flat

    def _extend(self, nodes: tape.Tape) -> None:
        prefix = f"part{self.num_parts}/"
        self.num_parts += 1
        for i, node in enumerate(nodes.nodes):
            node.name = f"{prefix}{node.op_type}_{i}"
            for j, value in enumerate(node.outputs):
                value.name = f"{node.name}_{j}"
        self.graph.extend(nodes.nodes)

    def fold_batch_norms(self) -> None:
        """Take what follows a convolution, one factor and one summand for each channel, into its weight and its bias.

        Float32 rounds a little differently then. int8 would otherwise cut off values before they have their scale.
        """
        for conv in [node for node in self.graph if node.op_type == "Conv"]:
            factor = self._channels_after(conv, "Mul")
            if factor is not None:
                self._replace(conv, 1, conv.inputs[1].const_value.numpy() * factor.reshape(-1, 1, 1, 1))
                if len(conv.inputs) > 2:
                    self._replace(conv, 2, conv.inputs[2].const_value.numpy() * factor)
            summand = self._channels_after(conv, "Add")
            if summand is not None and len(conv.inputs) > 2:
                self._replace(conv, 2, conv.inputs[2].const_value.numpy() + summand)
            elif summand is not None:
                conv.resize_inputs(3)
                self._replace(conv, 2, summand)

    def _channels_after(self, conv: ir.Node, kind: str) -> np.ndarray | None:
        """[C] constant that alone follows a convolution, in a node that is then left out; or None."""
        output, weight = conv.outputs[0], conv.inputs[1].const_value
        users = [use.node for use in output.uses()]
        if weight is None or len(users) != 1 or users[0].op_type != kind or output.is_graph_output():
            return None
        [constant] = [value for value in users[0].inputs if value is not output] or [None]
        if constant is None or constant.const_value is None or constant.const_value.size != weight.shape[0]:
            return None
        if list(constant.const_value.shape)[-3:] != [weight.shape[0], 1, 1]:
            return None
        ir.convenience.replace_all_uses_with(users[0].outputs[0], output)
        self.graph.remove(users[0], safe=True)
        return constant.const_value.numpy().flatten()

    def _replace(self, node: ir.Node, index: int, array: np.ndarray) -> None:
        """Give a node another constant."""
        name = f"{node.name}/folded{index}_{len(self.graph.initializers)}"
        value = ir.Value(name=name, const_value=ir.tensor(array.astype(np.float32), name=name))
        self.graph.register_initializer(value)
        node.replace_input_with(index, value)

    def finish(self, outputs: dict[str, tuple[ir.Value, list[int | str]]]) -> ir.Model:
        """Name the outputs, and leave out what they do not need."""
        self.fold_batch_norms()
        for name, (value, shape) in outputs.items():
            value.name = name
            value.shape = ir.Shape(shape)
            self.graph.outputs.append(value)
        for name, value in list(self.graph.initializers.items()):
            if not value.uses() and not value.is_graph_output():
                del self.graph.initializers[name]
        return self.model


@contextlib.contextmanager
def _quiet():
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        yield


def build_onnx_model(model: CoDETR, reverse_channels: bool, postprocess: str = "top-k") -> ir.Model:
    """
    Args:
        model: in eval mode, on the CPU.
        reverse_channels: the model reads BGR; the graph reads RGB.
        postprocess: ``top-k`` chooses the best pairs of query and class; ``soft-nms`` also puts them through soft-NMS,
            with the model's threshold; ``none`` leaves all predictions as they are.

    Returns:
        The graph, with the inputs ``images`` and ``sizes`` of :class:`Preprocess` and the outputs ``boxes``,
        ``scores`` and ``classes`` of :class:`Finish`, and where the model has masks those of :class:`Masks`, ``masks``
        and ``mask_scores``; or the outputs ``logits`` and ``boxes`` of :class:`Decode`.
    """
    channels = len(model.pixel_mean)
    graph = _Graph(
        {
            "images": (ir.DataType.UINT8, ["batch", "height", "width", channels]),
            "sizes": (ir.DataType.INT64, ["batch", 2]),
        }
    )
    images, sizes = graph.inputs

    preprocess = Preprocess(model, reverse_channels).eval()
    batch = Dim("batch", min=1)
    limit = {"max": preprocess.side} if preprocess.side else {}
    # Large enough for several of Swin's windows at stride 32: torch takes a size for granted that is 1.
    height, width = (min(x, preprocess.side or x) for x in (416, 480))
    example = torch.zeros(2, height, width, channels, dtype=torch.uint8), torch.tensor([[height, width], [80, 100]])
    shapes = {0: batch, 1: Dim("height", min=1, **limit), 2: Dim("width", min=1, **limit)}, {0: batch}
    x, batch_shape, valid = graph.add(preprocess, example, shapes, [images, sizes])
    with torch.no_grad():
        example_x, example_shape, example_valid = preprocess(*example)

    features, example_features = _add_backbone(graph, model, x, example_x, preprocess.unit, preprocess.side > 0)
    levels, example_levels = features, example_features
    if model.neck is not None:
        shapes = [{0: batch, **_sides(i, preprocess.side > 0)} for i in range(len(features))]
        neck = Neck(model).eval()
        levels = graph.add(neck, (example_features,), (shapes,), features)
        with torch.no_grad():
            example_levels = neck(example_features)

    level_shapes = [{0: batch, **_sides(i, preprocess.side > 0)} for i in range(len(levels))]
    encode = Encode(model).eval()
    geometry = (example_levels, example_shape, example_valid)
    geometry_shapes = (level_shapes, None, {0: batch})
    memory, padding, *others = graph.add(encode, geometry, geometry_shapes, [*levels, batch_shape, valid])
    with torch.no_grad():
        example_memory, example_padding, *example_others = encode(*geometry)

    head = model.query_head
    tokens = {0: batch} if preprocess.side else {0: batch, 1: Dim("tokens", min=1)}
    args, arg_shapes = [example_memory, example_padding], [tokens, tokens]
    values = [*levels, batch_shape, valid, memory, padding]
    if isinstance(head, TwoStageQueryHead):
        scores, embeddings, prior_logits, *others = others
        _, *example_proposals = example_others[:3]
        index = graph.top(scores, head.num_queries)
        index.name = PROPOSALS
        args += [torch.zeros(2, 7, dtype=torch.int64), *example_proposals]
        arg_shapes += [{0: batch, 1: Dim("queries", min=1, max=head.num_queries)}, tokens, tokens]
        values += [index, embeddings, prior_logits]
    decode = Decode(model).eval()
    logits, boxes = graph.add(decode, (*geometry, *args), (*geometry_shapes, *arg_shapes), values)
    with torch.no_grad():
        example_logits, example_boxes = decode(*geometry, *args)

    rows: list[int | str] = ["batch", "queries"]
    if postprocess == "none":
        return graph.finish({"logits": (logits, [*rows, example_logits.shape[2]]), "boxes": (boxes, [*rows, 4])})
    queries, number = {0: batch, 1: Dim("queries", min=1)}, {0: batch, 1: Dim("detections", min=1)}
    is_soft_nms = postprocess == "soft-nms"
    best = (
        graph.top(graph.flatten(logits), like=logits)
        if is_soft_nms
        else graph.top(graph.flatten(logits), head.max_detections)
    )
    example = example_logits, example_boxes, torch.zeros(2, 5, dtype=torch.int64), example_valid
    detections = graph.add(Select(), example, (queries, queries, number, {0: batch}), [logits, boxes, best, valid])
    with torch.no_grad():
        example = (*Select()(*example), example_valid)
    values, shapes = [*detections, sizes], [number, number, number, {0: batch}]
    if is_soft_nms:
        values[1] = graph.take(soft_nms_model(head.soft_nms_thresh), detections)[0]
        values.append(graph.top(values[1], head.max_detections))
        example = (*example, torch.zeros(2, 4, dtype=torch.int64))
        shapes.append({0: batch, 1: Dim("kept", min=1)})
    detections = graph.add(Finish(), example, tuple(shapes), values)
    rows = ["batch", "detections"]
    outputs = dict(zip(("boxes", "scores", "classes"), zip(detections, ([*rows, 4], rows, rows))))
    if has_masks(model):
        example_maps = [torch.randn(2, example_memory.shape[2], *x.shape[2:]) for x in example_levels]
        with torch.no_grad():
            example = (example_maps, *Finish()(*example))
        masks, *scores = graph.add(Masks(model).eval(), example, (level_shapes, *[number] * 3), [*others, *detections])
        outputs["masks"] = masks, [*rows, "mask_height", "mask_width"]
        if scores:
            outputs["mask_scores"] = scores[0], rows
    return graph.finish(outputs)


def _sides(index: int, has_one_size: bool, unit: int = 1) -> dict[int, Dim]:
    """Dynamic height and width of a map, in multiples of ``unit``."""
    if has_one_size:
        return {}
    return {2: unit * Dim(f"height{index}", min=1), 3: unit * Dim(f"width{index}", min=1)}


def _add_backbone(
    graph: _Graph, model: CoDETR, x: ir.Value, example: Tensor, unit: int, has_one_size: bool
) -> tuple[list[ir.Value], list[Tensor]]:
    """Values and examples of the features that the model reads, from fine to coarse."""
    values, examples = {}, {}
    for module, names in backbone_stages(model.backbone, model.in_features, has_one_size):
        module.eval()
        shapes = {0: Dim("batch", min=1), **_sides(0, has_one_size, unit)}
        outputs = graph.add(module, (example,), (shapes,), [x])
        with torch.no_grad():
            example_outputs = module(example)
        for name, value, feature in zip(reversed(names), reversed(outputs), reversed(example_outputs)):
            values[name], examples[name] = value, feature
        x, example, unit = outputs[0], example_outputs[0], 1
    return [values[name] for name in model.in_features], [examples[name] for name in model.in_features]
