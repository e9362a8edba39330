"""Detection heads: the query heads, and the auxiliary heads that train the encoder and feed the decoder."""

from .anchors import RatioMajorAnchorGenerator
from .atss import ATSSHead
from .auxiliary import AUX_HEAD_REGISTRY, AuxiliaryHead, build_auxiliary_head
from .co_deformable_detr import CoDeformableDETRHead
from .co_dino import CoDINOHead
from .query_head import QUERY_HEAD_REGISTRY, QueryHead
from .refine_mask import RefineMaskHead
from .roi import CoROIHeads, CoRPN, ROIHead

__all__ = [
    "AUX_HEAD_REGISTRY",
    "QUERY_HEAD_REGISTRY",
    "ATSSHead",
    "AuxiliaryHead",
    "CoDINOHead",
    "CoDeformableDETRHead",
    "CoROIHeads",
    "CoRPN",
    "QueryHead",
    "ROIHead",
    "RatioMajorAnchorGenerator",
    "RefineMaskHead",
    "build_auxiliary_head",
]
