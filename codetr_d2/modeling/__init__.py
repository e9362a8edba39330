"""The model: images -> backbone -> neck -> encoder -> (auxiliary heads) -> decoder -> losses or detections."""

from . import backbones  # noqa: F401 (registers them)
from .meta_arch import CoDETR

__all__ = ["CoDETR"]
