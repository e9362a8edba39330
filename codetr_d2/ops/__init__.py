"""The operators: deformable attention (``torch.ops.codetr_d2.ms_deform_attn``) and its backends, feed-forward networks,
ROIAlign; what keeps freed CPU memory; where bfloat16 is fast. A folder holds an operator's Python and C++."""

from .bfloat16 import fast_bfloat16, inference_dtype
from .cpu_memory import keep_freed_memory
from .feed_forward import feed_forward
from .ms_deform_attn import active_backend, check_backend, ms_deform_attn, ms_deform_attn_eager
from .roi_align import roi_align

__all__ = [
    "active_backend",
    "check_backend",
    "fast_bfloat16",
    "feed_forward",
    "inference_dtype",
    "keep_freed_memory",
    "ms_deform_attn",
    "ms_deform_attn_eager",
    "roi_align",
]
