"""The transformers: deformable over several levels, and plain over one."""

from .conditional_decoder import ConditionalDecoder, ConditionalDecoderLayer
from .decoder import DeformableDecoder, DeformableDecoderLayer
from .encoder import DeformableEncoder, DeformableEncoderLayer
from .perceptrons import box_branch, class_branch, perceptron
from .plain_encoder import PlainEncoder, PlainEncoderLayer

__all__ = [
    "ConditionalDecoder",
    "ConditionalDecoderLayer",
    "DeformableDecoder",
    "DeformableDecoderLayer",
    "DeformableEncoder",
    "DeformableEncoderLayer",
    "PlainEncoder",
    "PlainEncoderLayer",
    "box_branch",
    "class_branch",
    "perceptron",
]
