"""The floating-point operations of one operator's call, also of those that PyTorch's own table does not know.

A multiplication and its addition are two operations here, as in PyTorch's ``flop_registry``. Counted are convolutions,
matrix products, attention, and the samples that deformable attention and ROIAlign take; what works element by element
or normalises counts nothing.
"""

import contextlib
import math

import torch
from detectron2.evaluation import inference_context
from torch import Tensor, nn
from torch._subclasses.fake_tensor import FakeTensorMode
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

__all__ = ["count_flops", "detection_flops"]


def deformable_attention_flops(*tensors: Tensor) -> int:
    """A multiplication and an addition for each channel of each of the four taps of a point."""
    value, weights = (next(x for x in tensors if x.dim() == dim) for dim in (4, 5))
    return 2 * 4 * weights.numel() * value.shape[-1]


def deformable_attention_backward_flops(*tensors: Tensor) -> int:
    """The gradient of the values as many as forward; the products of gradient and taps as many again."""
    return 2 * deformable_attention_flops(*tensors)


def attention_flops(query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> int:
    """Two matrix products of [B, heads, queries, keys]."""
    return 2 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def attention_backward_flops(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_: Tensor) -> int:
    """Five matrix products, of which one is made again."""
    return 2 * query[..., 0].numel() * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


def feed_forward_flops(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, *_: Tensor) -> int:
    """Two matrix products."""
    return 2 * len(x) * (weight1.numel() + weight2.numel())


def feed_forward_backward_flops(grad: Tensor, x: Tensor, hidden: Tensor, weight1: Tensor, weight2: Tensor) -> int:
    """Four matrix products, where all gradients are needed."""
    return 4 * len(x) * (weight1.numel() + weight2.numel())


# Forward and backward, of the tensors that an operator takes: for operators with this in their names, as a profile
# shows them, which are not in PyTorch's table.
FLOPS = {
    "ms_deform_attn": (deformable_attention_flops, deformable_attention_backward_flops),
    "feed_forward": (feed_forward_flops, feed_forward_backward_flops),
    "scaled_dot_product_flash_attention_for_cpu": (attention_flops, attention_backward_flops),
}


def grid_sample_flops(input: Tensor, grid: Tensor, *_: object) -> int:
    """As deformable attention, which calls it where it is plain PyTorch: four taps for each channel of each point."""
    return 2 * 4 * input.shape[1] * grid[..., 0].numel()


def roi_align_flops(maps: Tensor, rois: Tensor, scale: float, rows: int, columns: int, *others: object) -> int:
    """Four taps for each channel of each sample; the gradient of the maps takes as many.

    Args:
        maps: [B, C, H, W], or their gradient [R, C, rows, columns].
        rois: [R, 5] (index of the image, x1, y1, x2, y2).
        scale: cells of the map in a unit of the ROIs' coordinates.
        rows, columns: bins of a ROI.
        others: the last two are the samples of a bin and axis, or 0 for as many as it has cells, and ``aligned``.
    """
    *_, ratio, aligned = others
    if ratio > 0:
        samples = len(rois) * ratio**2
    else:
        least = -math.inf if aligned else 1.0
        widths, heights = ((rois[:, i + 2] - rois[:, i]).double().mul(scale).clamp(min=least) for i in (1, 2))
        samples = int(((widths / columns).ceil().clamp(min=0) * (heights / rows).ceil().clamp(min=0)).sum())
    return 2 * 4 * maps.shape[1] * rows * columns * samples


def count_flops(func: torch._ops.OpOverload, args: tuple, kwargs: dict, output: object, tensors: list[Tensor]) -> int:
    """The floating-point operations of one call; none for what is no matrix product or the like.

    Args:
        func: the operator, as a ``TorchDispatchMode`` sees it.
        args, kwargs, output: what it takes and gives.
        tensors: all tensors that it takes.
    """
    name = func.overloadpacket.__name__
    for part, (forward, backward) in FLOPS.items():
        if part in name and tensors:  # without, it says what instructions its kernels use
            return (backward if name.endswith("backward") else forward)(*tensors)
    if "roi_align" in name:
        return roi_align_flops(*args)
    if name == "grid_sampler_2d":
        return grid_sample_flops(*args)
    formula = flop_registry.get(func.overloadpacket)
    return formula(*args, **kwargs, out_val=output) if formula else 0


class _Sum(TorchDispatchMode):
    """Adds up the floating-point operations of all operators that run."""

    def __init__(self):
        super().__init__()
        self.flops = 0

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.flops += count_flops(func, args, kwargs, output, tensors)
        return output


def detection_flops(model: nn.Module, size: tuple[int, int]) -> int:
    """What the boxes of one image cost, counted without computing them: in a second or two, whatever the model's size.

    The operators run on tensors that have shapes and no numbers. Neither weights nor random generators are touched, and
    the model is left in the mode that it was in. What depends on numbers comes after the boxes and is not counted:
    masks.

    Args:
        model: a :class:`~codetr_d2.modeling.meta_arch.CoDETR`.
        size: (height, width) of the image in pixels. The model pads it as usual.

    Returns:
        FLOPs; a multiplication with its addition counts once, as in :class:`~codetr_d2.analysis.cost.ModuleCost`.
    """
    # Nothing can be counted inside compiled modules.
    eager = torch.compiler.set_stance("force_eager") if model.is_compiled else contextlib.nullcontext()
    with torch.no_grad(), inference_context(model), eager:
        images = model.preprocess([{"image": torch.zeros(3, *size, dtype=torch.uint8)}])
        with FakeTensorMode(allow_non_fake_inputs=True), _Sum() as counter:
            model.predict(model.encode(model.features(images)))
    return counter.flops // 2
