"""What the benchmark compares the model with: itself with optimisations taken back, or somebody else's model."""

from collections.abc import Callable
from contextlib import nullcontext
from unittest import mock

import torch
import torchvision
from detectron2.config import CfgNode
from torch import Tensor, nn

from codetr_d2 import ops
from codetr_d2.errors import InputError
from codetr_d2.layers import MultiScaleDeformableAttention, deformable_attention
from codetr_d2.modeling.auxiliary import roi
from codetr_d2.modeling.queries import TwoStageProposals, gather_tokens
from codetr_d2.modeling.structures import DecoderOutput, EncoderProposals, FeaturePyramid, QueryGroup
from codetr_d2.modeling.transformer import DeformableDecoder
from codetr_d2.modeling.transformer.encoder import FeedForward

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


def no_auxiliary_heads(cfg: CfgNode) -> None:
    """K = 0: the plain detector."""
    cfg.MODEL.CODETR.AUX_HEADS = []


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


def without_kept_memory(cfg: CfgNode) -> None:
    """Freed memory goes back to the system, and comes from it anew."""
    _patch(ops, "keep_freed_memory", lambda: None)


def without_folded_batch_norm(cfg: CfgNode) -> None:
    """Frozen batch norm after the convolution; filters in training have it there anyway."""
    _patch(meta_arch, "fold_frozen_batch_norm", lambda module: None)


def without_channels_last(cfg: CfgNode) -> None:
    """Feature maps in PyTorch's usual layout, those of the auxiliary heads too."""
    of_tokens = FeaturePyramid.maps
    _patch(meta_arch, "map_layout", lambda device: torch.contiguous_format)
    _patch(FeaturePyramid, "maps", lambda pyramid: [x.contiguous() for x in of_tokens(pyramid)])


def without_feed_forward(cfg: CfgNode) -> None:
    """The feed-forward network by PyTorch's layers, with a copy of its hidden features for ReLU."""

    def forward(ffn: nn.Module, x: Tensor) -> Tensor:
        return ffn.linear2(ffn.dropout(ffn.linear1(x).relu()))

    _patch(FeedForward, "forward", forward)


def without_kept_geometry(cfg: CfgNode) -> None:
    """Positions, reference points and priors for every image anew, and attention that masks where nothing is padded."""
    _patch(FeaturePyramid, "geometry", property(lambda pyramid: object()))
    _patch(FeaturePyramid, "value_mask", property(lambda pyramid: pyramid.padding_mask))


def without_scaled_weights(cfg: CfgNode) -> None:
    """Every sampling offset divided by the size of its level."""

    def offsets(attention: nn.Module, query: Tensor, spatial_shapes: Tensor) -> Tensor:
        offsets = attention.sampling_offsets(query)
        parts = offsets.unflatten(-1, (attention.num_heads, attention.num_levels, attention.num_points, 2))
        return (parts / spatial_shapes.flip(1)[:, None]).view_as(offsets)

    _patch(MultiScaleDeformableAttention, "offsets_from_points", offsets)


def without_rows_of_points(cfg: CfgNode) -> None:
    """Sampling offsets added to the reference points, or scaled by the boxes, pair by pair."""

    def locations(attention: nn.Module, reference_points: Tensor, offsets: Tensor) -> Tensor:
        heads, levels, points = attention.num_heads, attention.num_levels, attention.num_points
        offsets = offsets.unflatten(2, (heads, levels, points, 2))
        reference_points = reference_points[:, :, None, :, None]
        if reference_points.shape[-1] == 4:
            offsets = offsets * (reference_points[..., 2:] * (0.5 / points))
        return reference_points[..., :2] + offsets

    _patch(MultiScaleDeformableAttention, "sampling_locations", locations)


def without_chosen_boxes(cfg: CfgNode) -> None:
    """The encoder's boxes at every token, of which the best are taken."""
    of_all = TwoStageProposals.box_logits

    def box_logits(module: TwoStageProposals, proposals: EncoderProposals, index: Tensor | None = None) -> Tensor:
        boxes = of_all(module, proposals)
        return boxes if index is None else gather_tokens(boxes, index)

    _patch(TwoStageProposals, "box_logits", box_logits)


def without_roi_align(cfg: CfgNode) -> None:
    """torchvision's ROIAlign."""
    _patch(roi, "roi_align", torchvision.ops.roi_align)


def without_fast_nms(cfg: CfgNode) -> None:
    """torchvision's NMS."""
    _patch(roi, "FastNMS", nullcontext)


# Each takes one optimisation back, in this process, before the model is built; it may also change the config.
OPTIMISATIONS: dict[str, Callable[[CfgNode], None]] = {
    "without-kept-memory": without_kept_memory,
    "without-folded-batch-norm": without_folded_batch_norm,
    "without-channels-last": without_channels_last,
    "without-feed-forward": without_feed_forward,
    "without-kept-geometry": without_kept_geometry,
    "without-scaled-weights": without_scaled_weights,
    "without-rows-of-points": without_rows_of_points,
    "without-chosen-boxes": without_chosen_boxes,
    "without-roi-align": without_roi_align,
    "without-fast-nms": without_fast_nms,
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
    "no-auxiliary-heads": no_auxiliary_heads,
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
