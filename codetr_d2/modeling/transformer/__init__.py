"""The deformable transformer."""

from .decoder import DeformableDecoder, DeformableDecoderLayer, box_branch, class_branch
from .encoder import DeformableEncoder, DeformableEncoderLayer

__all__ = [
    "DeformableDecoder",
    "DeformableDecoderLayer",
    "DeformableEncoder",
    "DeformableEncoderLayer",
    "box_branch",
    "class_branch",
]
