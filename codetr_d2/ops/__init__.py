"""The operators: deformable attention (``torch.ops.codetr_d2.ms_deform_attn``) and its backends, feed-forward networks,
ROIAlign; and what keeps freed CPU memory. A folder holds an operator's Python and C++."""

from .cpu_memory import keep_freed_memory
from .feed_forward import feed_forward
from .ms_deform_attn import active_backend, check_backend, ms_deform_attn, ms_deform_attn_eager
from .roi_align import roi_align

__all__ = [
    "active_backend",
    "check_backend",
    "feed_forward",
    "keep_freed_memory",
    "ms_deform_attn",
    "ms_deform_attn_eager",
    "roi_align",
]
