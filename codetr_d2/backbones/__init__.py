"""Backbones in detectron2's registry."""

from .timm import TimmBackbone, build_timm_backbone

__all__ = ["TimmBackbone", "build_timm_backbone"]
