"""Query heads: the detectors themselves."""

from .base import QUERY_HEAD_REGISTRY, QueryHead
from .co_deformable_detr import CoDeformableDETRHead
from .co_dino import CoDINOHead
from .conditional_detr import ConditionalDETRHead
from .dab_detr import DABDETRHead
from .single_level import SingleLevelQueryHead
from .two_stage import TwoStageQueryHead

__all__ = [
    "QUERY_HEAD_REGISTRY",
    "CoDINOHead",
    "CoDeformableDETRHead",
    "ConditionalDETRHead",
    "DABDETRHead",
    "QueryHead",
    "SingleLevelQueryHead",
    "TwoStageQueryHead",
]
