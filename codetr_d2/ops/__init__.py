"""Deformable attention: the operator ``torch.ops.codetr_d2.ms_deform_attn`` and its backends; memory on the CPU."""

from .cpu_memory import keep_freed_memory
from .eager import ms_deform_attn_eager
from .ms_deform_attn import active_backend, ms_deform_attn, set_backend

__all__ = ["active_backend", "keep_freed_memory", "ms_deform_attn", "ms_deform_attn_eager", "set_backend"]
