"""Instance masks of detections."""

from .refine import RefineMaskHead

__all__ = ["RefineMaskHead"]
