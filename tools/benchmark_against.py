"""What the benchmark compares the model with: itself with optimisations taken back, or somebody else's model."""

from collections.abc import Callable
from unittest import mock

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from codetr_d2.errors import InputError
from codetr_d2.layers import deformable_attention
from codetr_d2.structures import DecoderOutput, QueryGroup
from codetr_d2.transformer import DeformableDecoder

__all__ = ["HF", "PACKAGE", "TAKE_BACK", "DeformableDETR", "package_operator", "take_back", "transformers_or_error"]

HF, PACKAGE = "hf", "torch-ms-deform-attn"


def _patch(target: object, name: str, new: object) -> None:
    """Replace an attribute for good: a side of a comparison has a process of its own. Fails where there is none."""
    mock.patch.object(target, name, new).start()


def without_fused_attention(cfg: CfgNode) -> None:
    """Plain attention as matrix products and a softmax, which keep the whole attention matrix."""
    for kind in ("flash", "mem_efficient", "cudnn"):  # "flash" is the CPU's kernel, too
        getattr(torch.backends.cuda, f"enable_{kind}_sdp")(False)


def without_fused_optimizer(cfg: CfgNode) -> None:
    """The optimizer's step for one parameter after the other."""

    class OneByOne(torch.optim.AdamW):
        def __init__(self, groups, lr, **_):
            super().__init__(groups, lr=lr, foreach=False)

    _patch(torch.optim, "AdamW", OneByOne)


def separate_passes(cfg: CfgNode) -> None:
    """K + 1 passes of the decoder, as published: matching and denoising queries, then each auxiliary head's."""
    together = DeformableDecoder.forward

    def forward(decoder: nn.Module, groups: list[QueryGroup], *args, **kwargs) -> list[DecoderOutput]:
        passes: list[list[QueryGroup]] = []
        for group in groups:
            if not group.sees_previous:
                passes.append([])
            passes[-1].append(group)
        return [output for part in passes for output in together(decoder, part, *args, **kwargs)]

    _patch(DeformableDecoder, "forward", forward)


def package_operator() -> Callable[..., Tensor]:
    """The operator of PyPI's torch-ms-deform-attn, whose tensors must have one dtype.

    Raises:
        InputError: it is not installed.
    """
    try:
        from torch_ms_deform_attn import ms_deform_attn
    except ImportError as error:
        raise InputError(
            f"--against {PACKAGE} needs that package ({error}): pip install --no-build-isolation {PACKAGE}==0.1.1"
        ) from None

    def operator(
        value: Tensor, spatial_shapes: Tensor, level_start_index: Tensor, locations: Tensor, weights: Tensor
    ) -> Tensor:
        return ms_deform_attn(
            value.contiguous(), spatial_shapes, level_start_index, locations.to(value.dtype), weights.to(value.dtype)
        )

    return operator


def with_package_operator(cfg: CfgNode) -> None:
    """Deformable attention by PyPI's torch-ms-deform-attn."""
    _patch(deformable_attention, "ms_deform_attn", package_operator())


# Each takes one optimisation back, in this process, before the model is built; it may also change the config.
OPTIMISATIONS: dict[str, Callable[[CfgNode], None]] = {
    "without-fused-attention": without_fused_attention,
    "without-fused-optimizer": without_fused_optimizer,
}


def eager(cfg: CfgNode) -> None:
    """Plain PyTorch: the eager operator, and every optimisation above taken back."""
    for function in OPTIMISATIONS.values():
        function(cfg)
    cfg.MODEL.MS_DEFORM_ATTN = "eager"


TAKE_BACK = {
    "eager": eager,
    "separate-passes": separate_passes,
    PACKAGE: with_package_operator,
    **OPTIMISATIONS,
}


def take_back(names: list[str], cfg: CfgNode) -> None:
    """Make this process compute as the names say, all together; changes the config too."""
    for name in names:
        TAKE_BACK[name](cfg)


def transformers_or_error():
    """The module ``transformers``.

    Raises:
        InputError: it is not installed.
    """
    try:
        import transformers
    except ImportError as error:
        raise InputError(f"--against {HF} needs transformers ({error}): pip install transformers") from None
    return transformers


class DeformableDETR(nn.Module):
    """transformers' Deformable DETR: ResNet-50, two stages, box refinement; otherwise its defaults, random weights.

    Its images take no padding, and its output is not turned into detections.

    Args:
        num_queries, num_classes: as our model has.
    """

    def __init__(self, num_queries: int, num_classes: int):
        super().__init__()
        transformers = transformers_or_error()
        config = transformers.DeformableDetrConfig(
            use_timm_backbone=False,
            use_pretrained_backbone=False,
            backbone=None,
            backbone_config=transformers.ResNetConfig(out_features=["stage2", "stage3", "stage4"]),
            num_queries=num_queries,
            two_stage_num_proposals=num_queries,
            two_stage=True,
            with_box_refine=True,
            num_labels=num_classes,
        )
        self.model = transformers.DeformableDetrForObjectDetection(config)

    def forward(self, batched_inputs: list[dict]):
        images = torch.stack([x["image"] for x in batched_inputs])
        return self.model(pixel_values=images.to(self.model.device, torch.float32) / 255)
