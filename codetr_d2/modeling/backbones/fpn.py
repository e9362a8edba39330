"""Backbones under detectron2's feature pyramid network, for detectron2's own detectors."""

from functools import partial

from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, FPN, Backbone
from detectron2.modeling.backbone.fpn import LastLevelMaxPool

from ..facts import stating
from .swin import SwinBackbone, swin_from_config
from .timm import timm_from_config

__all__ = ["build_swin_fpn_backbone", "build_timm_fpn_backbone"]


def _with_fpn(bottom_up: Backbone, cfg: CfgNode) -> FPN:
    options = cfg.MODEL.FPN
    return FPN(
        bottom_up=bottom_up,
        in_features=options.IN_FEATURES,
        out_channels=options.OUT_CHANNELS,
        norm=options.NORM,
        top_block=LastLevelMaxPool(),
        fuse_type=options.FUSE_TYPE,
    )


@BACKBONE_REGISTRY.register()
@stating(check_options=partial(SwinBackbone.check_options, features="MODEL.FPN.IN_FEATURES"))
def build_swin_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """``MODEL.SWIN`` under an FPN (``MODEL.FPN``), whose ``IN_FEATURES`` are of ``p0`` to ``p3``.

    The pyramid's own features are named by their stride, as detectron2 does: p2 (stride 4), p3, ... and one above.
    """
    return _with_fpn(swin_from_config(cfg, input_shape, "MODEL.FPN.IN_FEATURES"), cfg)


@BACKBONE_REGISTRY.register()
def build_timm_fpn_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> FPN:
    """``MODEL.TIMM`` under an FPN (``MODEL.FPN``), whose ``IN_FEATURES`` are like ``stride4``, ``stride8``."""
    return _with_fpn(timm_from_config(cfg, input_shape, cfg.MODEL.FPN.IN_FEATURES), cfg)
