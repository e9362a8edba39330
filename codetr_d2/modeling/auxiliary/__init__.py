"""Auxiliary heads: they train the encoder by one-to-many assignment and feed the decoder; inference drops them."""

from .anchors import RatioMajorAnchorGenerator
from .atss import ATSSHead
from .base import AUX_HEAD_REGISTRY, AnchorSizes, AuxiliaryHead, auxiliary_head_names, build_auxiliary_head
from .dense import DenseHead, DenseTargets
from .fcos import FCOSHead
from .gfl import GFLHead
from .paa import PAAHead
from .retinanet import RetinaNetHead
from .roi import CoROIHeads, CoRPN, ROIHead

__all__ = [
    "AUX_HEAD_REGISTRY",
    "ATSSHead",
    "AnchorSizes",
    "AuxiliaryHead",
    "CoROIHeads",
    "CoRPN",
    "DenseHead",
    "DenseTargets",
    "FCOSHead",
    "GFLHead",
    "PAAHead",
    "ROIHead",
    "RatioMajorAnchorGenerator",
    "RetinaNetHead",
    "auxiliary_head_names",
    "build_auxiliary_head",
]
