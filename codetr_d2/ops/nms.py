"""Non-maximum suppression (NMS) on the CPU: ``torch.ops.codetr_d2._nms_cpp``, in place of torchvision's operator."""

import torch
import torchvision  # noqa: F401, defines torch.ops.torchvision.nms
from torch import Tensor
from torch.utils._python_dispatch import TorchDispatchMode

from .ms_deform_attn import library_is_loaded

__all__ = ["FastNMS"]

CPP_DTYPES = (torch.float32, torch.float64)


class FastNMS(TorchDispatchMode):
    """A context in which ``torchvision.ops.nms`` on the CPU is computed by the compiled library, whoever calls it.

    It keeps exactly the same boxes in the same order. Other dtypes and devices, and everything if the library is not
    built, stay with torchvision. Detectron2's functions call it deep inside, and have no other place to choose what
    computes it.
    """

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        if func is torch.ops.torchvision.nms.default and library_is_loaded():
            boxes: Tensor = args[0]
            if boxes.device.type == "cpu" and boxes.dtype in CPP_DTYPES:
                return torch.ops.codetr_d2._nms_cpp(*args)
        return func(*args, **(kwargs or {}))
