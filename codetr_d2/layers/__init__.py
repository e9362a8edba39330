"""Modules that know nothing of detection."""

from .attention import AttentionBlock, BlockSelfAttention
from .box_coordinates import inverse_sigmoid, paired_giou, paired_iou, pairwise_giou, sine_embedding
from .conditional_attention import ConditionalCrossAttention, ConditionalSelfAttention
from .deformable_attention import MultiScaleDeformableAttention
from .losses import focal_loss, quality_focal_loss
from .position_encoding import SinePositionEncoding
from .soft_nms import soft_nms
from .winograd import conv3x3

__all__ = [
    "AttentionBlock",
    "BlockSelfAttention",
    "ConditionalCrossAttention",
    "ConditionalSelfAttention",
    "MultiScaleDeformableAttention",
    "SinePositionEncoding",
    "conv3x3",
    "focal_loss",
    "inverse_sigmoid",
    "paired_giou",
    "paired_iou",
    "pairwise_giou",
    "quality_focal_loss",
    "sine_embedding",
    "soft_nms",
]
