"""Backbones in detectron2's registry."""

from .eva02 import Eva02, Eva02Pyramid, build_eva02_pyramid_backbone, rotary_tables
from .fpn import build_swin_fpn_backbone, build_timm_fpn_backbone
from .swin import SwinBackbone, build_swin_backbone
from .timm import TimmBackbone, build_timm_backbone

__all__ = [
    "Eva02",
    "Eva02Pyramid",
    "SwinBackbone",
    "TimmBackbone",
    "build_eva02_pyramid_backbone",
    "build_swin_backbone",
    "build_swin_fpn_backbone",
    "build_timm_backbone",
    "build_timm_fpn_backbone",
    "rotary_tables",
]
