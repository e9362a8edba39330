"""Modules that know nothing of detection."""

from .attention import BlockSelfAttention
from .box_coordinates import inverse_sigmoid, paired_giou, pairwise_giou, sine_embedding
from .deformable_attention import MultiScaleDeformableAttention
from .position_encoding import SinePositionEncoding

__all__ = [
    "BlockSelfAttention",
    "MultiScaleDeformableAttention",
    "SinePositionEncoding",
    "inverse_sigmoid",
    "paired_giou",
    "pairwise_giou",
    "sine_embedding",
]
