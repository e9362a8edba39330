"""What the benchmark compares ours with: our model with another config or decoder, or somebody else's code."""

from collections.abc import Callable

import torch
from detectron2.config import CfgNode
from torch import Tensor, nn

from codetr_d2.errors import InputError
from codetr_d2.modeling.pyramid import FeaturePyramid
from codetr_d2.modeling.structures import DecoderOutput, QueryGroup

__all__ = [
    "EAGER",
    "HF",
    "NO_AUXILIARY_HEADS",
    "PACKAGE",
    "SEPARATE_PASSES",
    "DeformableDETR",
    "SeparatePasses",
    "config_of",
    "package_operator",
    "transformers_or_error",
]

EAGER, SEPARATE_PASSES, NO_AUXILIARY_HEADS = "eager", "separate-passes", "no-auxiliary-heads"
HF, PACKAGE = "hf", "torch-ms-deform-attn"


def config_of(cfg: CfgNode, against: list[str]) -> CfgNode:
    """A copy of our model's config, as a side has it."""
    cfg = cfg.clone()
    if EAGER in against:
        cfg.MODEL.MS_DEFORM_ATTN = "eager"
    if NO_AUXILIARY_HEADS in against:
        cfg.MODEL.CODETR.AUX_HEADS = []
    return cfg


class SeparatePasses(nn.Module):
    """K + 1 passes of a decoder, as published: matching and denoising queries, then those of each auxiliary head."""

    def __init__(self, decoder: nn.Module):
        super().__init__()
        self.decoder = decoder

    def forward(self, groups: list[QueryGroup], pyramid: FeaturePyramid) -> list[DecoderOutput]:
        passes: list[list[QueryGroup]] = []
        for group in groups:
            if not group.sees_previous:
                passes.append([])
            passes[-1].append(group)
        return [output for part in passes for output in self.decoder(part, pyramid)]


def package_operator() -> Callable[..., Tensor]:
    """The operator of PyPI's torch-ms-deform-attn.

    Raises:
        InputError: it is not installed.
    """
    try:
        from torch_ms_deform_attn import ms_deform_attn
    except ImportError as error:
        raise InputError(
            f"--against {PACKAGE} needs that package ({error}): pip install --no-build-isolation {PACKAGE}==0.1.1"
        ) from None
    return ms_deform_attn


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
