"""Multi-scale deformable attention: the operator and its backends."""

from .eager import ms_deform_attn_eager
from .operator import active_backend, check_backend, ms_deform_attn

__all__ = ["active_backend", "check_backend", "ms_deform_attn", "ms_deform_attn_eager"]
