"""detectron2's Swin Transformer (V1), made ready for detection by the options of the config."""

from collections.abc import Sequence
from functools import partial

import numpy as np
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY
from detectron2.modeling.backbone.swin import SwinTransformer
from timm.layers import DropPath
from torch.utils.checkpoint import checkpoint

from ...errors import InputError

__all__ = ["SwinBackbone", "build_swin_backbone", "swin_from_config"]


class SwinBackbone(SwinTransformer):
    """Swin Transformer with the features ``p0``, ``p1``, ... at strides 4, 8, ...: those asked for, each with a norm.

    Images may have any size. Parameters are named as in the published weights.

    Args:
        out_features: names of the features to return; the model ends after the last of them.
        embed_dim: channels of the first stage; they double from stage to stage.
        depths, num_heads: blocks, and attention heads of each block, by stage.
        window_size: side of the attention windows.
        drop_path_rate: stochastic depth of the last block in training; it rises linearly from 0.
        activation_checkpointing: recompute each block in the backward pass.

    Raises:
        InputError: a feature does not exist.
    """

    def __init__(
        self,
        out_features: Sequence[str],
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        drop_path_rate: float = 0.2,
        activation_checkpointing: bool = False,
    ):
        names = [f"p{i}" for i in range(len(depths))]
        missing = [name for name in out_features if name not in names]
        if missing:
            raise InputError(
                f"MODEL.CODETR.IN_FEATURES (MODEL.FPN.IN_FEATURES under an FPN): Swin has no {missing}; it has "
                f"{', '.join(names)}."
            )
        num_stages = 1 + max(names.index(name) for name in out_features)
        super().__init__(
            embed_dim=embed_dim,
            depths=depths[:num_stages],
            num_heads=num_heads[:num_stages],
            window_size=window_size,
            drop_path_rate=0.0,  # set below: detectron2 looks for DropPath where timm no longer keeps it
            out_indices=[i for i, name in enumerate(names) if name in out_features],
        )
        blocks = [block for layer in self.layers for block in layer.blocks]
        for block, rate in zip(blocks, np.linspace(0, drop_path_rate, sum(depths)).tolist()):
            if rate:
                block.drop_path = DropPath(rate)
            if activation_checkpointing:  # detectron2's own needs inputs with a gradient
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    @property
    def size_divisibility(self) -> int:
        return 0


def swin_from_config(cfg: CfgNode, out_features: Sequence[str]) -> SwinBackbone:
    """``MODEL.SWIN`` -> backbone with the given features."""
    options = cfg.MODEL.SWIN
    return SwinBackbone(
        out_features,
        embed_dim=options.EMBED_DIM,
        depths=options.DEPTHS,
        num_heads=options.NUM_HEADS,
        window_size=options.WINDOW_SIZE,
        drop_path_rate=options.DROP_PATH_RATE,
        activation_checkpointing=options.ACTIVATION_CHECKPOINTING,
    )


@BACKBONE_REGISTRY.register()
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SwinBackbone:
    """``MODEL.SWIN`` -> backbone with the features that ``MODEL.CODETR.IN_FEATURES`` names."""
    return swin_from_config(cfg, cfg.MODEL.CODETR.IN_FEATURES)
