"""EVA-02 vision transformer with a simple feature pyramid (ViTDet's way from one feature map to several)."""

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from detectron2.modeling.backbone.utils import PatchEmbed, get_abs_pos, window_partition, window_unpartition
from timm.layers import DropPath, LayerNorm2d
from timm.layers.pos_embed_sincos import apply_rot_embed, build_rotary_pos_embed
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from ...errors import InputError
from ...option_checks import divisible, one_of, positive, share
from ..facts import stating

__all__ = ["Eva02", "Eva02Pyramid", "build_eva02_pyramid_backbone", "rotary_tables"]

# Rotary positions run from 0 to this, however many tokens there are: the grid that EVA-02 was pretrained on.
_ROTARY_RANGE = 16

_LEVELS = ("p2", "p3", "p4", "p5", "p6")


def rotary_tables(height: int, width: int, head_dim: int, device: torch.device | None = None) -> tuple[Tensor, Tensor]:
    """Cosines and sines of the rotary position embedding on a grid of tokens.

    The first half of the channels turns by the row, the second by the column, both scaled to 0..16. Channels 2j and
    2j + 1 of a half form a pair that turns by position * 10000^(-4j / head_dim).

    Published weights hold these tables as buffers ``freqs_cos`` and ``freqs_sin`` of ``rope_win`` (a window),
    ``rope_glb`` (an image) and, once more, of the ``attn.rope`` of each block.

    Args:
        height, width: tokens.
        head_dim: channels of an attention head, a multiple of 4.
        device: of the result.

    Returns:
        [height * width, head_dim] cosines, and sines of the same shape, float32; tokens in row-major order.
    """
    sin, cos = build_rotary_pos_embed(
        [height, width], dim=head_dim, in_pixels=False, ref_feat_shape=[_ROTARY_RANGE] * 2, device=device
    )
    return cos, sin


class RotaryAttention(nn.Module):
    """Self-attention of tokens on a grid; queries and keys are rotated, and keys have no bias."""

    def __init__(self, dim: int, num_heads: int):
        super().__init__()
        self.num_heads = num_heads
        self.q_proj, self.k_proj, self.v_proj = (nn.Linear(dim, dim, bias=False) for _ in range(3))
        # Beside the projections and not in them: so the published parameters are named.
        self.q_bias = nn.Parameter(torch.zeros(dim))
        self.v_bias = nn.Parameter(torch.zeros(dim))
        self.proj = nn.Linear(dim, dim)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """[B, h, w, C] and the :func:`rotary_tables` of h and w -> [B, h, w, C]."""
        cos, sin = tables
        q = F.linear(x, self.q_proj.weight, self.q_bias)
        k = F.linear(x, self.k_proj.weight)
        v = F.linear(x, self.v_proj.weight, self.v_bias)
        # [B, h, w, C] -> [B, heads, h * w, C / heads]
        q, k, v = (y.flatten(1, 2).unflatten(-1, (self.num_heads, -1)).transpose(1, 2) for y in (q, k, v))
        # The tables are float32, and so is the rotation under mixed precision.
        q, k = (apply_rot_embed(y, sin, cos).type_as(v) for y in (q, k))
        y = F.scaled_dot_product_attention(q, k, v)
        return self.proj(y.transpose(1, 2).reshape(x.shape))


class SwiGLU(nn.Module):
    """Feed-forward network with a gate, and a norm before its last layer."""

    def __init__(self, dim: int, hidden_dim: int):
        super().__init__()
        self.w1 = nn.Linear(dim, hidden_dim)
        self.w2 = nn.Linear(dim, hidden_dim)
        self.ffn_ln = nn.LayerNorm(hidden_dim, eps=1e-6)
        self.w3 = nn.Linear(hidden_dim, dim)

    def forward(self, x: Tensor) -> Tensor:
        return self.w3(self.ffn_ln(F.silu(self.w1(x)) * self.w2(x)))


class Block(nn.Module):
    """Pre-norm transformer block.

    Args:
        dim, num_heads: of the attention.
        window_size: tokens along a window's side; 0 attends to the whole image. What does not fill a window is padded
            with zeros after the norm, and the padding takes part in the attention.
        drop_path: probability to leave a branch out in training.
    """

    def __init__(self, dim: int, num_heads: int, window_size: int, drop_path: float):
        super().__init__()
        self.window_size = window_size
        self.norm1 = nn.LayerNorm(dim, eps=1e-6)
        self.attn = RotaryAttention(dim, num_heads)
        self.norm2 = nn.LayerNorm(dim, eps=1e-6)
        self.mlp = SwiGLU(dim, int(dim * 8 / 3))
        self.drop_path = DropPath(drop_path)

    def forward(self, x: Tensor, tables: tuple[Tensor, Tensor]) -> Tensor:
        """[B, h, w, C] and the rotary tables of the window, or of h and w -> [B, h, w, C]."""
        y = self.norm1(x)
        if self.window_size:
            y, padded = window_partition(y, self.window_size)
            y = window_unpartition(self.attn(y, tables), self.window_size, padded, x.shape[1:3])
        else:
            y = self.attn(y, tables)
        x = x + self.drop_path(y)
        return x + self.drop_path(self.mlp(self.norm2(x)))


class Eva02(nn.Module):
    """EVA-02 vision transformer with windowed and global attention; one feature map. Parameters are named as published.

    Args:
        embed_dim: channels.
        depth: number of blocks.
        num_heads: attention heads of each block; ``embed_dim`` is a multiple of four times as many.
        patch_size: pixels along a token's side.
        window_size: tokens along a window's side.
        global_blocks: the blocks that attend to the whole image, the others attend within windows.
        pretrain_image_size: pixels along the side of the images that the absolute position embedding is for; it is
            resized to others.
        image_size: > 0: pixels along the side of the only images that are let in, squares; 0: images of any size.
        drop_path_rate: stochastic depth of the last block in training; it rises linearly from 0.
        activation_checkpointing: recompute each block in the backward pass.
        freeze_at: parts that are not trained: 0 none, 1 the patch and position embeddings, 2 also the first block, and
            so on.
        in_channels: channels of the images.
    """

    def __init__(
        self,
        embed_dim: int,
        depth: int,
        num_heads: int,
        patch_size: int,
        window_size: int,
        global_blocks: Sequence[int],
        pretrain_image_size: int,
        image_size: int = 0,
        drop_path_rate: float = 0.0,
        activation_checkpointing: bool = False,
        freeze_at: int = 0,
        in_channels: int = 3,
    ):
        super().__init__()
        self.head_dim = embed_dim // num_heads
        self.window_size = window_size
        self.image_size = image_size
        self.activation_checkpointing = activation_checkpointing
        patch = (patch_size, patch_size)
        self.patch_embed = PatchEmbed(patch, patch, in_chans=in_channels, embed_dim=embed_dim)
        # The first is the class token's, which detection has no use for.
        self.pos_embed = nn.Parameter(torch.zeros(1, 1 + (pretrain_image_size // patch_size) ** 2, embed_dim))
        self.blocks = nn.ModuleList(
            Block(embed_dim, num_heads, 0 if i in global_blocks else window_size, rate if i + 1 >= freeze_at else 0.0)
            for i, rate in enumerate(np.linspace(0, drop_path_rate, depth).tolist())
        )
        self.out_norm = nn.LayerNorm(embed_dim)
        nn.init.trunc_normal_(self.pos_embed, std=0.02)
        for module in self.modules():
            if isinstance(module, (nn.Linear, nn.Conv2d)):
                nn.init.trunc_normal_(module.weight, std=0.02)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
        for part in [self.patch_embed, *self.blocks][:freeze_at]:
            part.requires_grad_(False)
        self.pos_embed.requires_grad_(freeze_at == 0)

    def forward(self, images: Tensor) -> Tensor:
        """[B, in_channels, H, W] normalised images, of whole patches -> [B, C, H / patch_size, W / patch_size].

        Raises:
            InputError: the images are not squares of ``image_size`` pixels, where that is set.
        """
        if self.image_size and images.shape[2:] != (self.image_size, self.image_size):
            raise InputError(
                f"MODEL.EVA02.IMAGE_SIZE is {self.image_size}, but an image of {images.shape[2]} x {images.shape[3]} "
                "pixels came; let INPUT make squares of that size, or set 0 for images of any size"
            )
        x = self.patch_embed(images)  # [B, h, w, C]
        height, width = x.shape[1:3]
        x = x + get_abs_pos(self.pos_embed, True, (height, width))
        window_tables = rotary_tables(self.window_size, self.window_size, self.head_dim, x.device)
        image_tables = rotary_tables(height, width, self.head_dim, x.device)
        for block in self.blocks:
            tables = window_tables if block.window_size else image_tables
            if self.activation_checkpointing:
                x = checkpoint(block, x, tables, use_reentrant=False)
            else:
                x = block(x, tables)
        return self.out_norm(x).permute(0, 3, 1, 2).contiguous()


class Eva02Pyramid(Backbone):
    """A ViT's single feature map turned into ``p2`` to ``p6``, at strides 4 to 64 where patches have 16 pixels.

    Args:
        net: the ViT.
        out_channels: channels of every level.
        out_features: names of the levels to return; there are no others in the model.
    """

    PUBLISHED_NAMES = [
        ("backbone.patch_embed.{rest}", "net.patch_embed.{rest}"),
        ("backbone.blocks.{rest}", "net.blocks.{rest}"),
        ("backbone.pos_embed", "net.pos_embed"),
        ("backbone.out_norm.{rest}", "net.out_norm.{rest}"),
        ("neck.p{n}.{rest}", "p{n}.{rest}"),
    ]
    DEPTH_OPTION = "MODEL.EVA02.DEPTH"
    OPTIONS_OF_SHAPES = {
        "net.pos_embed": "MODEL.EVA02.PRETRAIN_IMAGE_SIZE and EMBED_DIM",
        "net.patch_embed": "MODEL.EVA02.PATCH_SIZE, EMBED_DIM and MODEL.PIXEL_MEAN (an entry for each channel)",
        "net": "MODEL.EVA02.EMBED_DIM and NUM_HEADS",
        "": "MODEL.FPN.OUT_CHANNELS and MODEL.EVA02.EMBED_DIM",
    }

    @classmethod
    def check_options(cls, cfg: CfgNode) -> None:
        options = cfg.MODEL.EVA02
        one_of(cfg, "MODEL.CODETR.IN_FEATURES", _LEVELS)
        positive(cfg, *(f"MODEL.EVA02.{x}" for x in ("EMBED_DIM", "DEPTH", "NUM_HEADS", "WINDOW_SIZE")))
        positive(cfg, "MODEL.EVA02.PATCH_SIZE", "MODEL.EVA02.PRETRAIN_IMAGE_SIZE", "MODEL.FPN.OUT_CHANNELS")
        share(cfg, "MODEL.EVA02.DROP_PATH_RATE")
        patch = options.PATCH_SIZE
        divisible("MODEL.EVA02.EMBED_DIM", options.EMBED_DIM, 4 * options.NUM_HEADS, "4 times MODEL.EVA02.NUM_HEADS")
        divisible("MODEL.EVA02.PATCH_SIZE", patch, 4, "the refinement to p2")
        divisible("MODEL.EVA02.PRETRAIN_IMAGE_SIZE", options.PRETRAIN_IMAGE_SIZE, patch, "MODEL.EVA02.PATCH_SIZE")
        divisible("MODEL.EVA02.IMAGE_SIZE", options.IMAGE_SIZE, 2 * patch, "twice MODEL.EVA02.PATCH_SIZE")
        outside = [i for i in options.GLOBAL_BLOCKS if i not in range(options.DEPTH)]
        if outside:
            raise InputError(
                f"MODEL.EVA02.GLOBAL_BLOCKS has {outside[0]!r}, but blocks count from 0 to MODEL.EVA02.DEPTH - 1 "
                f"({options.DEPTH - 1})"
            )
        if cfg.MODEL.META_ARCHITECTURE == "CoDETR":
            canvas = cfg.MODEL.CODETR.CANVAS_SIZE
            if options.IMAGE_SIZE not in (0, canvas):
                raise InputError(
                    f"MODEL.EVA02.IMAGE_SIZE is {options.IMAGE_SIZE}; it must be 0, or MODEL.CODETR.CANVAS_SIZE "
                    f"({canvas}): the side of the square that images lie on"
                )

    def __init__(self, net: Eva02, out_channels: int, out_features: Sequence[str] = _LEVELS):
        super().__init__()
        self.net = net
        dim = net.pos_embed.shape[-1]
        patch_size = net.patch_embed.proj.stride[0]
        self._output_shape = {
            name: ShapeSpec(channels=out_channels, stride=patch_size * 2**i // 4)
            for i, name in enumerate(_LEVELS)
            if name in out_features
        }

        def conv(in_dim: int, out_dim: int, kernel_size: int, stride: int = 1) -> list[nn.Module]:
            return [
                nn.Conv2d(in_dim, out_dim, kernel_size, stride, kernel_size // 2, bias=False),
                LayerNorm2d(out_dim, eps=1e-6),
            ]

        def output(in_dim: int) -> list[nn.Module]:
            return [*conv(in_dim, out_channels, 1), nn.GELU(), *conv(out_channels, out_channels, 3)]

        def double(in_dim: int) -> list[nn.Module]:
            return [nn.Upsample(scale_factor=2), *conv(in_dim, in_dim // 2, 3), nn.GELU()]

        def halve() -> nn.Module:
            return nn.MaxPool2d(3, 2, 1)

        levels = {
            "p2": lambda: [*double(dim), *double(dim // 2), *output(dim // 4)],
            "p3": lambda: [*double(dim), *output(dim // 2)],
            "p4": lambda: output(dim),
            "p5": lambda: [halve(), *output(dim)],
            "p6": lambda: [halve(), *conv(dim, dim, 3, 2), nn.GELU(), *output(dim)],
        }
        for name in self._output_shape:
            self.add_module(name, nn.Sequential(*levels[name]()))

    def forward(self, images: Tensor) -> dict[str, Tensor]:
        """[B, C, H, W] normalised images -> feature maps by name."""
        x = self.net(images)
        return {name: getattr(self, name)(x) for name in self._output_shape}

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._output_shape

    @property
    def size_divisibility(self) -> int:
        return 2 * self.net.patch_embed.proj.stride[0]

    @property
    def padding_constraints(self) -> dict[str, int]:
        """A square of ``image_size`` pixels, where the ViT lets in nothing else."""
        return {"size_divisibility": self.size_divisibility, "square_size": self.net.image_size}


@BACKBONE_REGISTRY.register()
@stating(
    check_options=Eva02Pyramid.check_options,
    PUBLISHED_NAMES=Eva02Pyramid.PUBLISHED_NAMES,
    DEPTH_OPTION=Eva02Pyramid.DEPTH_OPTION,
)
def build_eva02_pyramid_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> Eva02Pyramid:
    """``MODEL.EVA02`` -> backbone with the features that ``MODEL.CODETR.IN_FEATURES`` names (p2 to p6).

    They have ``MODEL.FPN.OUT_CHANNELS`` channels.

    Raises:
        InputError: the options are faulty.
    """
    Eva02Pyramid.check_options(cfg)
    options = cfg.MODEL.EVA02
    net = Eva02(
        embed_dim=options.EMBED_DIM,
        depth=options.DEPTH,
        num_heads=options.NUM_HEADS,
        patch_size=options.PATCH_SIZE,
        window_size=options.WINDOW_SIZE,
        global_blocks=options.GLOBAL_BLOCKS,
        pretrain_image_size=options.PRETRAIN_IMAGE_SIZE,
        image_size=options.IMAGE_SIZE,
        drop_path_rate=options.DROP_PATH_RATE,
        activation_checkpointing=options.ACTIVATION_CHECKPOINTING,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        in_channels=input_shape.channels,
    )
    return Eva02Pyramid(net, cfg.MODEL.FPN.OUT_CHANNELS, cfg.MODEL.CODETR.IN_FEATURES)
