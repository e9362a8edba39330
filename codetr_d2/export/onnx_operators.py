"""The project's own operators in ONNX's, for ``torch.onnx.export``."""

import onnx_ir as ir
import torch
import torchvision  # noqa: F401 (defines an operator)
from onnxscript import FLOAT, INT64, script
from onnxscript import opset18 as op

from ..ops.library import library_is_loaded
from . import backbones  # noqa: F401 (defines an operator)

__all__ = ["OPSET", "soft_nms_model", "translations"]

OPSET = 18  # GridSample for maps (from 16 on) and ReduceSum as ONNX Runtime, OpenVINO and TensorRT know them


def translations() -> dict:
    """For the argument ``custom_translation_table`` of ``torch.onnx.export``."""
    table = {torch.ops.codetr_d2.ms_deform_attn.default: _ms_deform_attn}
    table[torch.ops.torchvision.roi_align.default] = _roi_align
    table[torch.ops.codetr_d2.conv2d_same.default] = _conv2d_same
    if library_is_loaded():
        table[torch.ops.codetr_d2._feed_forward_cpp.default] = _feed_forward
        table[torch.ops.codetr_d2._roi_align_cpp.default] = _roi_align
    return table


def _ints(*values: int):
    return op.Constant(value_ints=list(values))


def _size(value):
    """A size, a number or a tensor of none or one dimension -> a tensor of one."""
    return _ints(value) if isinstance(value, int) else op.Reshape(value, _ints(-1))


def _ms_deform_attn(value, spatial_shapes, sampling_locations, attention_weights, backend="auto"):
    """:func:`codetr_d2.ops.ms_deform_attn` by GridSample, level by level, images and heads as one batch."""
    maps = op.Transpose(value, perm=[0, 2, 3, 1])  # [B, S, H, D] -> [B, H, D, S]
    maps = op.Reshape(maps, op.Concat(_ints(-1), op.Shape(maps, start=2, end=4), axis=0))  # [B * H, D, S]
    grids = op.Transpose(sampling_locations, perm=[0, 2, 3, 1, 4, 5])  # [B, Q, H, L, P, 2] -> [B, H, L, Q, P, 2]
    grids = op.Reshape(grids, op.Concat(_ints(-1), op.Shape(grids, start=2, end=6), axis=0))
    grids = op.Sub(op.Mul(grids, op.Constant(value_float=2.0)), op.Constant(value_float=1.0))
    weights = op.Transpose(attention_weights, perm=[0, 2, 3, 1, 4])  # [B, Q, H, L, P] -> [B, H, L, Q, P]
    weights = op.Reshape(weights, op.Concat(_ints(-1, 1), op.Shape(weights, start=2, end=5), axis=0))
    start, result = _ints(0), None
    for level, (height, width) in enumerate(zip(spatial_shapes[::2], spatial_shapes[1::2])):
        height, width = _size(height), _size(width)
        stop = op.Add(start, op.Mul(height, width))
        features = op.Slice(maps, start, stop, _ints(2))
        features = op.Reshape(features, op.Concat(op.Shape(features, start=0, end=2), height, width, axis=0))
        grid = op.Gather(grids, op.Constant(value_int=level), axis=1)  # [B * H, Q, P, 2]
        sampled = op.GridSample(features, grid, mode="bilinear", padding_mode="zeros", align_corners=0)
        sampled = op.Mul(sampled, op.Gather(weights, op.Constant(value_int=level), axis=2))  # [B * H, D, Q, P]
        sampled = op.ReduceSum(sampled, _ints(-1), keepdims=0)
        result = sampled if result is None else op.Add(result, sampled)
        start = stop
    # [B * H, D, Q] -> [B, H, D, Q] -> [B, Q, H, D] -> [B, Q, H * D]
    queries = op.Shape(sampling_locations, start=1, end=2)
    result = op.Reshape(result, op.Concat(_ints(-1), op.Shape(value, start=2), queries, axis=0))
    return op.Reshape(op.Transpose(result, perm=[0, 3, 1, 2]), _ints(0, 0, -1))


def _feed_forward(x, weight1, bias1, weight2, bias2, keep_hidden):
    """Linear - ReLU - linear; the hidden features are never asked for at inference."""
    hidden = op.Relu(op.Gemm(x, weight1, bias1, transB=1))
    return op.Gemm(hidden, weight2, bias2, transB=1), op.Constant(value_floats=[0.0])


def _conv2d_same(x, weight, bias, stride, dilation, groups):
    options = {"strides": stride, "dilations": dilation, "group": groups, "auto_pad": "SAME_UPPER"}
    return op.Conv(x, weight, **options) if bias is None else op.Conv(x, weight, bias, **options)


def _roi_align(input, rois, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned):
    images = op.Cast(op.Gather(rois, op.Constant(value_int=0), axis=1), to=7)
    return op.RoiAlign(
        input,
        op.Slice(rois, _ints(1), _ints(5), _ints(1)),
        images,
        coordinate_transformation_mode="half_pixel" if aligned else "output_half_pixel",
        output_height=pooled_height,
        output_width=pooled_width,
        sampling_ratio=max(sampling_ratio, 0),
        spatial_scale=spatial_scale,
    )


def soft_nms_model(iou_threshold: float, min_score: float = 1e-3) -> ir.Model:
    """:func:`codetr_d2.layers.soft_nms` for each image: [B, N, 4] boxes, [B, N] scores, [B, N] classes -> new scores.

    The scores of boxes that are dropped are 0.
    """

    @script(default_opset=op)
    def soft_nms(boxes: FLOAT[...], scores: FLOAT[...], classes: INT64[...]) -> FLOAT[...]:
        left = op.Where(scores < min_score, 0.0, scores)
        kept = left * 0.0
        corner1, corner2 = op.Split(boxes, axis=2, num_outputs=2)
        areas = op.ReduceProd(corner2 - corner1, axes=[2], keepdims=0)
        number = op.Squeeze(op.Shape(scores, start=1, end=2))
        places = op.Unsqueeze(op.Range(0, number, 1), [0])
        for _ in range(number):
            best = op.ArgMax(left, axis=1, keepdims=1)
            score = op.GatherElements(left, best, axis=1)
            index = op.Tile(op.Unsqueeze(best, [2]), [1, 1, 2])
            sides = op.Max(
                op.Min(corner2, op.GatherElements(corner2, index, axis=1))
                - op.Max(corner1, op.GatherElements(corner1, index, axis=1)),
                0.0,
            )
            common = op.ReduceProd(sides, axes=[2], keepdims=0)
            iou = common / (areas + op.GatherElements(areas, best, axis=1) - common)
            is_near = op.And(iou >= iou_threshold, classes == op.GatherElements(classes, best, axis=1))
            is_best = places == best
            kept = op.Where(op.And(is_best, score >= min_score), score, kept)
            left = op.Where(is_best, 0.0, op.Where(is_near, left * (1.0 - iou), left))
        return kept

    return ir.from_proto(soft_nms.to_model_proto())
