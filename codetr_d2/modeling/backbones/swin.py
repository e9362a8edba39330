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
from ...option_checks import divisible, one_of, option, positive, share
from ..facts import stating

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
        freeze_at: parts that are not trained: 0 none, 1 the patch embedding, 2 also the first stage, and so on.
        in_channels: channels of the images.
    """

    PUBLISHED_NAMES = [
        (f"backbone.{name}.{{rest}}", f"{name}.{{rest}}") for name in ("patch_embed", "layers", "norm{n}")
    ]
    OPTIONS_OF_SHAPES = {
        "layers.*.blocks.*.attn.relative_position_*": "MODEL.SWIN.WINDOW_SIZE and NUM_HEADS",
        "patch_embed": "MODEL.SWIN.EMBED_DIM and MODEL.PIXEL_MEAN (an entry for each channel)",
        "": "MODEL.SWIN.EMBED_DIM and NUM_HEADS",
    }
    OPTIONAL_PARTS = {"norm*": "the norm of a feature that MODEL.CODETR.IN_FEATURES does not list"}

    @classmethod
    def check_options(cls, cfg: CfgNode, features: str = "MODEL.CODETR.IN_FEATURES") -> None:
        """Check ``MODEL.SWIN``, and that the features exist which the option ``features`` names."""
        options = cfg.MODEL.SWIN
        one_of(cfg, features, [f"p{i}" for i in range(len(options.DEPTHS))])
        positive(cfg, "MODEL.SWIN.EMBED_DIM", "MODEL.SWIN.WINDOW_SIZE")
        share(cfg, "MODEL.SWIN.DROP_PATH_RATE")
        if len(options.DEPTHS) != len(options.NUM_HEADS):
            raise InputError(
                f"MODEL.SWIN.NUM_HEADS is {options.NUM_HEADS}; it must have an entry for each of MODEL.SWIN.DEPTHS "
                f"({options.DEPTHS})"
            )
        if not all(isinstance(x, int) and x > 0 for x in (*options.DEPTHS, *options.NUM_HEADS)):
            raise InputError("MODEL.SWIN.DEPTHS and MODEL.SWIN.NUM_HEADS must have only whole numbers greater than 0")
        for i, heads in enumerate(options.NUM_HEADS):
            what = f"entry {i} of MODEL.SWIN.NUM_HEADS"
            divisible(f"MODEL.SWIN.EMBED_DIM times {2**i}", options.EMBED_DIM * 2**i, heads, what)

    def __init__(
        self,
        out_features: Sequence[str],
        embed_dim: int = 96,
        depths: Sequence[int] = (2, 2, 6, 2),
        num_heads: Sequence[int] = (3, 6, 12, 24),
        window_size: int = 7,
        drop_path_rate: float = 0.2,
        activation_checkpointing: bool = False,
        freeze_at: int = 0,
        in_channels: int = 3,
    ):
        names = [f"p{i}" for i in range(len(depths))]
        num_stages = 1 + max(names.index(name) for name in out_features)
        super().__init__(
            in_chans=in_channels,
            embed_dim=embed_dim,
            depths=depths[:num_stages],
            num_heads=num_heads[:num_stages],
            window_size=window_size,
            drop_path_rate=0.0,  # set below: detectron2 looks for DropPath where timm no longer keeps it
            out_indices=[i for i, name in enumerate(names) if name in out_features],
        )
        frozen = [self.patch_embed, *self.layers][:freeze_at]
        for part in frozen:
            part.requires_grad_(False)
        blocks = [(block, layer in frozen) for layer in self.layers for block in layer.blocks]
        for (block, is_frozen), rate in zip(blocks, np.linspace(0, drop_path_rate, sum(depths)).tolist()):
            if rate and not is_frozen:
                block.drop_path = DropPath(rate)
            if activation_checkpointing:  # detectron2's own needs inputs with a gradient
                block.forward = partial(checkpoint, block.forward, use_reentrant=False)

    @property
    def size_divisibility(self) -> int:
        return 0


def swin_from_config(cfg: CfgNode, input_shape: ShapeSpec, features: str = "MODEL.CODETR.IN_FEATURES") -> SwinBackbone:
    """``MODEL.SWIN`` -> backbone with the features that the option ``features`` names, for ``input_shape.channels``.

    Raises:
        InputError: the options are faulty.
    """
    SwinBackbone.check_options(cfg, features)
    options = cfg.MODEL.SWIN
    return SwinBackbone(
        option(cfg, features),
        embed_dim=options.EMBED_DIM,
        depths=options.DEPTHS,
        num_heads=options.NUM_HEADS,
        window_size=options.WINDOW_SIZE,
        drop_path_rate=options.DROP_PATH_RATE,
        activation_checkpointing=options.ACTIVATION_CHECKPOINTING,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        in_channels=input_shape.channels,
    )


@BACKBONE_REGISTRY.register()
@stating(check_options=SwinBackbone.check_options, PUBLISHED_NAMES=SwinBackbone.PUBLISHED_NAMES)
def build_swin_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> SwinBackbone:
    """``MODEL.SWIN`` -> backbone with the features that ``MODEL.CODETR.IN_FEATURES`` names."""
    return swin_from_config(cfg, input_shape)
