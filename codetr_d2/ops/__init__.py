"""Deformable attention, the operator ``torch.ops.codetr_d2.ms_deform_attn`` and its backends; feed-forward
networks; ROIAlign; NMS; CPU memory."""

from .cpu_memory import keep_freed_memory
from .eager import ms_deform_attn_eager
from .feed_forward import feed_forward
from .ms_deform_attn import active_backend, ms_deform_attn, set_backend
from .nms import FastNMS
from .roi_align import roi_align

__all__ = [
    "FastNMS",
    "active_backend",
    "feed_forward",
    "keep_freed_memory",
    "ms_deform_attn",
    "ms_deform_attn_eager",
    "roi_align",
    "set_backend",
]
