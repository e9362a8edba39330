"""ROIAlign: the operator ``torch.ops.codetr_d2._roi_align_cpp`` on the CPU, torchvision's elsewhere."""

import torch
import torchvision
from torch import Tensor

from ..library import library_is_loaded

__all__ = ["roi_align"]

CPP_DTYPES = (torch.float32, torch.float64)


def _fake(input, rois, spatial_scale, pooled_height, pooled_width, sampling_ratio, aligned):
    return input.new_empty((rois.shape[0], input.shape[1], pooled_height, pooled_width))


def _fake_backward(grad, rois, scale, pooled_height, pooled_width, batch, channels, height, width, ratio, aligned):
    return grad.new_empty((batch, height, width, channels)).permute(0, 3, 1, 2)


def _setup_context(ctx, inputs, output):
    input, rois, *ctx.scale_and_bins, ctx.sampling_ratio, ctx.aligned = inputs
    ctx.save_for_backward(rois)
    ctx.input_shape = input.shape


def _backward(ctx, grad):
    grad_input = torch.ops.codetr_d2._roi_align_cpp_backward(
        grad, *ctx.saved_tensors, *ctx.scale_and_bins, *ctx.input_shape, ctx.sampling_ratio, ctx.aligned
    )
    return grad_input, *[None] * 6


if library_is_loaded():
    torch.library.register_fake("codetr_d2::_roi_align_cpp", _fake)
    torch.library.register_fake("codetr_d2::_roi_align_cpp_backward", _fake_backward)
    torch.library.register_autograd("codetr_d2::_roi_align_cpp", _backward, setup_context=_setup_context)


def roi_align(
    input: Tensor,
    rois: Tensor,
    output_size: tuple[int, int],
    spatial_scale: float,
    sampling_ratio: int,
    aligned: bool,
) -> Tensor:
    """The mean of bilinear samples in each bin of each region of interest (ROI).

    A cell of the map counts as a point, at its index; a sample between two points interpolates. Samples within one
    cell outside the outermost points take the border's value, those farther out count as zero. Source: Mask R-CNN (He
    et al., ICCV 2017), section 3.

    The results are those of ``torchvision.ops.roi_align``, which computes them where the compiled library does not:
    on GPUs, in half precision, or if it is not built. The library reads maps that are channels last as they lie, their
    gradient is channels last, and each repeats exactly, whatever the number of threads. A ROI with a coordinate that is
    NaN or infinite gives zeros, and no gradient; torchvision may crash or never come back. ROIs get no gradient.

    Args:
        input: [B, C, H, W] maps, float.
        rois: [R, 5] (index of the image in the batch, x1, y1, x2, y2), of the dtype of ``input``.
        output_size: bins (rows, columns) of a ROI.
        spatial_scale: cells of the map in a unit of the ROIs' coordinates, 1 / stride for pixels.
        sampling_ratio: rows and columns of samples in each bin; 0 or less takes as many as a bin has cells, rounded up.
        aligned: the centre of the first cell lies at (0.5, 0.5) of the map, as for detectron2's ``ROIAlignV2``.
            Otherwise it lies at (0, 0), and a ROI counts as one cell wide and high at least.

    Returns:
        [R, C, *output_size].

    Raises:
        RuntimeError: sizes or dtypes that don't fit each other; an index of no image, if the library computes.
    """
    if library_is_loaded() and input.device.type == "cpu" and input.dtype in CPP_DTYPES:
        return torch.ops.codetr_d2._roi_align_cpp(input, rois, spatial_scale, *output_size, sampling_ratio, aligned)
    return torchvision.ops.roi_align(input, rois, output_size, spatial_scale, sampling_ratio, aligned)
