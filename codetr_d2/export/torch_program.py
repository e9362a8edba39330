"""The detector as one program of torch.export, a ``.pt2`` file, and compiled ahead of time by AOTInductor.

Either is a function (pictures, their sizes) -> (boxes, scores, classes) that runs without this package's Python. It
calls the operators of the package's compiled library, which ``torch.ops.load_library`` loads.
"""

import copy
import json
import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.modeling import SwinTransformer
from timm.layers import Conv2dSame
from torch import Tensor, nn
from torch.export import Dim, ExportedProgram

from ..errors import InputError, named_disk_problems
from ..inference.exported import Session
from ..modeling.meta_arch import CoDETR, map_layout
from ..modeling.pyramid import FeaturePyramid
from .parts import Finish, Neck, Preprocess, Select, TracedGeometry

__all__ = [
    "METADATA",
    "Detector",
    "compile_program",
    "export_program",
    "program_session",
    "program_sizes",
    "save_program",
]

METADATA = "codetr_d2.json"  # the name of what a program says of itself, inside its file


class Detector(nn.Module):
    """What a program computes: normalisation, padding masks, the detector, and the best pairs of query and class.

    Args:
        model: the detector, whose backbone is copied where it must be written otherwise for export.
        input_format: the order of colours that it was trained with, ``INPUT.FORMAT``: "BGR" or "RGB".
    """

    def __init__(self, model: CoDETR, input_format: str):
        super().__init__()
        self.preprocess = Preprocess(model, input_format == "BGR")
        self.backbone = with_simple_sizes(model.backbone)
        self.neck = Neck(model)
        self.query_head = model.query_head
        self.in_features = model.in_features
        self.strides = model.strides
        self.select, self.finish = Select(), Finish()

    def forward(self, images: Tensor, image_sizes: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """
        Args:
            images: [B, 3, H, W] uint8 or float32, RGB, 0 to 255: each picture at the top left. What is in its padding
                does not matter.
            image_sizes: [B, 2] int64, (height, width) of each picture in pixels.

        Returns:
            [B, N, 4] boxes (xyxy in pixels of ``images``, clipped to the picture), [B, N] scores and [B, N] int64
            classes of the N best pairs of query and class, by falling score. A box that lies outside of its picture
            has no area left, and the score 0.
        """
        x, batch_shape, sizes = self.preprocess(images.permute(0, 2, 3, 1), image_sizes)
        features = self.backbone(x.contiguous(memory_format=map_layout(x.device)))
        levels = self.neck([features[name] for name in self.in_features])
        shapes = [tuple(x.shape[2:]) for x in levels]
        geometry = TracedGeometry.of_levels(shapes, self.strides, sizes, batch_shape)
        tokens = torch.cat([x.flatten(2).transpose(1, 2) for x in levels], dim=1)
        output = self.query_head.predict(self.query_head.encode(FeaturePyramid(tokens, geometry)))
        logits, boxes = output.logits[-1], output.boxes[-1]
        num_kept = min(self.query_head.max_detections, logits.shape[1] * logits.shape[2])
        index = logits.flatten(1).topk(num_kept, dim=1).indices
        return self.finish(*self.select(logits, boxes, index, sizes), image_sizes)


class SameConv(nn.Module):
    """What timm's ``Conv2dSame`` computes, with sizes that torch's symbolic arithmetic keeps simple.

    It pads as TensorFlow does, so that ceil(size / stride) cells come out; how much on which side depends on the size.
    Here a fixed padding is added, and the cells are picked that the convolution would read.
    """

    def __init__(self, conv: Conv2dSame):
        super().__init__()
        self.conv = conv

    def forward(self, x: Tensor) -> Tensor:
        conv = self.conv
        for dim in (2, 3):
            kernel, stride = conv.dilation[dim - 2] * (conv.kernel_size[dim - 2] - 1) + 1, conv.stride[dim - 2]
            size, most = x.shape[dim], kernel // 2
            before = torch.sym_max(kernel - 1 - (size - 1) % stride, 0) // 2
            cells = torch.arange((size - 1) // stride * stride + kernel, device=x.device) + (most - before)
            sides = (0, 0) * (3 - dim) + (most, kernel)
            x = F.pad(x, sides).index_select(dim, cells)
        return F.conv2d(x, conv.weight, conv.bias, conv.stride, 0, conv.dilation, conv.groups)


def with_simple_sizes(backbone: nn.Module) -> nn.Module:
    """The backbone, or a copy of it with the same weights and each ``Conv2dSame`` written as :class:`SameConv`."""
    if not any(isinstance(x, Conv2dSame) for x in backbone.modules()):
        return backbone
    weights = {id(x): x for x in (*backbone.parameters(), *backbone.buffers())}
    backbone = copy.deepcopy(backbone, weights)
    for parent in list(backbone.modules()):
        for name, child in list(parent.named_children()):
            if isinstance(child, Conv2dSame):
                setattr(parent, name, SameConv(child))
    return backbone


def program_sizes(model: CoDETR, size: tuple[int, int] | None = None) -> dict[str, int | tuple[int, int] | None]:
    """Which sizes of the padded pictures, in pixels, a program of the model takes.

    Args:
        model: the detector.
        size: see :func:`export_program`.

    Returns:
        ``size``, (height, width), None where they are free; then they are multiples of ``multiple_of`` and at least
        ``smallest``.

    Raises:
        InputError: ``size`` does not suit the model.
    """
    multiple_of = model.size_divisibility
    # A level of one cell would be another program: torch treats a size of 1 as a case of its own.
    coarsest = max(model.strides[-1], 32)  # backbones go down to 32, whatever is read of them
    smallest = -(-(coarsest + 1) // multiple_of) * multiple_of
    side = model.canvas_size or model.backbone.padding_constraints.get("square_size", 0)
    if side and size not in (None, (side, side)):
        raise InputError(f"size {size[0]} x {size[1]}: this model takes {side} x {side} alone; leave the size out")
    if size and (any(x % multiple_of for x in size) or min(size) < smallest):
        raise InputError(
            f"size {size[0]} x {size[1]}: height and width must be multiples of {multiple_of} and at least {smallest}"
        )
    return {"size": (side, side) if side else size, "multiple_of": multiple_of, "smallest": smallest}


def export_program(model: CoDETR, input_format: str, size: tuple[int, int] | None = None) -> ExportedProgram:
    """The detector as a program of :class:`Detector`, in float32, for the kind of device that the model is on.

    Batch size, height and width are free, within :func:`program_sizes`. A model with a canvas, or with a backbone that
    wants squares, has that size alone. With Swin, a program takes one picture at a time, of the one ``size``. Soft-NMS
    and masks are not in the program.

    Args:
        model: the detector, in evaluation mode.
        input_format: see :class:`Detector`.
        size: (height, width) in pixels of all pictures that the program will take, padding included; None for any.

    Raises:
        InputError: detections of an auxiliary head are asked for, the model is compiled, ``size`` does not suit it, or
            it needs one: its backbone makes Python's numbers of the sizes of its features, as Swin does.
    """
    if model.eval_head != "detr":
        raise InputError(
            f'MODEL.CODETR.EVAL_HEAD is "{model.eval_head}": a torch program holds the detector alone; set it to "detr"'
        )
    if model.is_compiled:
        raise InputError("MODEL.CODETR.COMPILE is True: a program is made of the model itself; set it to False")
    size, unit, smallest = program_sizes(model, size).values()
    needs_size = InputError(
        f"{type(model.backbone).__name__} can't be exported for pictures of any size: give the one (height, width) to "
        "which all are padded, --size HEIGHT WIDTH"
    )
    # Detectron2's Swin makes Python's numbers of its sizes, and of the batch's.
    all_fixed = any(isinstance(x, SwinTransformer) for x in model.backbone.modules())
    if all_fixed and size is None:
        raise needs_size
    batch_size = 1 if all_fixed else 3
    batch = Dim("batch", min=1, max=1024)
    free = {} if all_fixed else {0: batch}
    free_sizes = dict(free)
    # Free sizes are tried out on some that differ: torch takes equal ones for one and the same.
    height, width = size or [-(-(times * smallest) // unit) * unit for times in (4, 5)]
    if size is None:
        for dim, name in ((2, "height"), (3, "width")):
            units = Dim(f"{name}_units" if unit > 1 else name, min=smallest // unit, max=16384 // unit)
            free[dim] = unit * units if unit > 1 else units
    images = torch.zeros(batch_size, 3, height, width, dtype=torch.uint8, device=model.device)
    image_sizes = torch.tensor([[height, width]] * batch_size, device=model.device)
    with torch.no_grad():
        detector = Detector(model, input_format).eval()
        try:
            return torch.export.export(detector, (images, image_sizes), dynamic_shapes=(free, free_sizes), strict=False)
        except torch._dynamo.exc.UserError as error:  # a size that must stay free is one number to the backbone
            if size is None:
                raise needs_size from error
            raise


def program_session(program: Callable[[Tensor, Tensor], tuple[Tensor, ...]], sizes: dict) -> Session:
    """A torch program as a :data:`Session`, which pads pictures to sizes that it takes, see :func:`program_sizes`."""

    def run(inputs: dict[str, np.ndarray]) -> dict[str, np.ndarray]:
        images = torch.from_numpy(inputs["images"]).permute(0, 3, 1, 2)
        unit = sizes["multiple_of"]
        height, width = sizes["size"] or (max(sizes["smallest"], -(-x // unit) * unit) for x in images.shape[2:])
        # Contiguous: compiled code reads memory as the exported inputs lay in it, and asks nothing.
        images = F.pad(images, (0, width - images.shape[3], 0, height - images.shape[2])).contiguous()
        with torch.no_grad():
            boxes, scores, classes = program(images, torch.from_numpy(inputs["sizes"]))
        return {"boxes": boxes.numpy(), "scores": scores.numpy(), "classes": classes.numpy()}

    return run


def save_program(program: ExportedProgram, path: str | Path, metadata: dict) -> None:
    """Write a program as ``.pt2``, for :func:`torch.export.load`, with ``metadata`` as JSON in the file METADATA."""
    with named_disk_problems(str(path)):
        torch.export.save(program, path, extra_files={METADATA: json.dumps(metadata)})


def compile_program(program: ExportedProgram, path: str | Path, metadata: dict) -> None:
    """Compile a program for this kind of machine, for :func:`torch._inductor.aoti_load_package`; it takes minutes.

    Args:
        program: of :func:`export_program`.
        path: the ``.pt2`` to write.
        metadata: kept as JSON under the name METADATA, which ``get_metadata`` of the loaded package gives.

    Raises:
        InputError: there is no C++ compiler.
    """
    compiler = os.environ.get("CXX", "clang++" if sys.platform == "darwin" else "g++")
    if shutil.which(compiler) is None:
        raise InputError(
            f"--compile needs a C++ compiler, and there is no {compiler}: install one (on Debian the package g++) or "
            "name it in the environment variable CXX, or leave --compile out"
        )
    options = {"aot_inductor.metadata": {METADATA: json.dumps(metadata)}}
    with named_disk_problems(str(path)):
        torch._inductor.aoti_compile_and_package(program, package_path=str(path), inductor_configs=options)
