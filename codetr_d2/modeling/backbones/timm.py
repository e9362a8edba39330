"""Any timm model with feature maps as a detectron2 backbone."""

from collections.abc import Sequence
from difflib import get_close_matches

import timm
import torch
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from timm.layers import freeze_batch_norm_2d
from timm.models import group_parameters
from timm.utils import freeze
from torch import Tensor, nn

from ...errors import InputError

__all__ = ["TimmBackbone", "build_timm_backbone", "timm_from_config"]

# What timm and PyTorch raise where a model has no feature maps or an image does not suit it.
_REFUSALS = (RuntimeError, AttributeError, TypeError, ValueError, AssertionError)


class TimmBackbone(Backbone):
    """Features of a timm model, named ``stride4``, ``stride8``, ``stride16``, ...

    Args:
        name: name of the timm model.
        out_features: names of the features to return; the model ends after the last of them.
        freeze_batch_norm: use the running statistics of batch norm and train none of its parameters.
        pretrained: load timm's own weights (needs network access).
        activation_checkpointing: recompute each block in the backward pass.
        freeze_at: parts that are not trained: 0 none, 1 the stem, 2 also the first stage, and so on, as timm groups the
            layers of a model. Batch norm in them uses its running statistics.
        in_channels: channels of the images.

    Raises:
        InputError: the name is not a timm model with feature maps, a feature does not exist, the model takes only
            images of its own size, or of three channels, or timm does not group its layers.
    """

    def __init__(
        self,
        name: str,
        out_features: Sequence[str],
        freeze_batch_norm: bool = True,
        pretrained: bool = False,
        activation_checkpointing: bool = False,
        freeze_at: int = 0,
        in_channels: int = 3,
    ):
        super().__init__()
        if name not in timm.list_models():
            close = get_close_matches(name, timm.list_models(), n=5)
            raise InputError(f"MODEL.TIMM.NAME: timm has no model {name!r}. Close to it: {', '.join(close) or 'none'}.")
        try:
            strides = _on_meta(name, in_chans=in_channels).feature_info.reduction()
        except _REFUSALS as error:
            raise InputError(
                f"MODEL.TIMM.NAME: {name!r} gives no feature maps ({error}). Choose another model."
            ) from error
        index = {f"stride{stride}": i for i, stride in enumerate(strides)}
        missing = [feature for feature in out_features if feature not in index]
        if missing:
            raise InputError(
                f"MODEL.CODETR.IN_FEATURES (MODEL.FPN.IN_FEATURES under an FPN): {name} has no {missing}; it has "
                f"{', '.join(index)}."
            )
        self.out_features = list(out_features)
        options, self._size_divisibility = _for_any_size(name, in_channels)
        indices = [index[feature] for feature in out_features]
        try:
            self.model = timm.create_model(
                name, features_only=True, out_indices=indices, pretrained=pretrained, **options
            )
        except (OSError, RuntimeError) as error:
            if not pretrained:
                raise
            raise InputError(
                f"MODEL.TIMM.PRETRAINED: timm cannot fetch its weights of {name} ({' '.join(str(error).split())}). "
                "Connect to the network, or set it to False and name a file in MODEL.WEIGHTS."
            ) from error
        channels, strides = self.model.feature_info.channels(), self.model.feature_info.reduction()
        self._output_shape = {
            feature: ShapeSpec(channels=c, stride=s) for feature, c, s in zip(out_features, channels, strides)
        }
        if freeze_batch_norm:
            # detectron2's FrozenBatchNorm2d would drop the activation that timm fuses into its batch norm.
            self.model = freeze_batch_norm_2d(self.model)
        if freeze_at > 0:
            _freeze(self.model, _first_parameters(name, freeze_at))
        if max(indices) < len(index) - 1:
            unused = _parameters_without_gradient(name, indices, options)
            for parameter_name, parameter in self.model.named_parameters():
                parameter.requires_grad_(parameter.requires_grad and parameter_name not in unused)
        if activation_checkpointing:
            if not hasattr(self.model, "set_grad_checkpointing"):
                raise InputError(f"MODEL.TIMM.ACTIVATION_CHECKPOINTING: timm has none for {name}; set it to False.")
            self.model.set_grad_checkpointing()

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, in_channels, H, W] normalised images -> feature maps [B, C, h, w] by name."""
        return dict(zip(self.out_features, _feature_maps(self.model, x)))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._output_shape

    @property
    def size_divisibility(self) -> int:
        return self._size_divisibility


def _feature_maps(model: nn.Module, x: Tensor) -> list[Tensor]:
    """[B, C, h, w] features, whatever order the model has them in."""
    features = model(x)
    if getattr(model, "output_fmt", "NCHW") == "NHWC":
        features = [y.permute(0, 3, 1, 2).contiguous() for y in features]
    return features


def _on_meta(name: str, features_only: bool = True, **options: object) -> nn.Module:
    """The model without memory for its weights: for its description, and for the shapes of its features."""
    with torch.device("meta"):
        return timm.create_model(name, features_only=features_only, **options).eval()


def _flat(parameter: str) -> str:
    """A parameter's name that a model and its version of feature maps agree in."""
    return parameter.removeprefix("model.").replace(".", "_")


def _first_parameters(name: str, freeze_at: int) -> set[str]:
    """Names of the parameters, :func:`_flat`, of the stem (``freeze_at`` 1), also of the first stage (2), and so on.

    Raises:
        InputError: timm does not say which these are.
    """
    model = _on_meta(name, features_only=False)
    if not hasattr(model, "group_matcher"):
        raise InputError(
            f"MODEL.BACKBONE.FREEZE_AT is {freeze_at}, but timm does not say what the stages of {name} are; set it to 0"
        )
    groups = group_parameters(model, model.group_matcher(coarse=True), reverse=True)
    return {_flat(parameter) for parameter, group in groups.items() if group < freeze_at}


def _freeze(model: nn.Module, names: set[str]) -> None:
    """Train none of the parameters with these :func:`_flat` names, and let their batch norms stand still."""
    for name, parameter in model.named_parameters():
        if _flat(name) in names:
            parameter.requires_grad_(False)
    norms = [
        name
        for name, module in model.named_modules()
        if isinstance(module, (nn.BatchNorm2d, nn.SyncBatchNorm)) and not module.weight.requires_grad
    ]
    if norms:  # none would mean all to timm
        freeze(model, norms)


@torch.enable_grad()
def _parameters_without_gradient(name: str, indices: list[int], options: dict[str, object]) -> set[str]:
    """Names of the parameters of the layers behind the last feature, which some models keep."""
    model = _on_meta(name, out_indices=indices, **options)
    image = torch.zeros(1, options["in_chans"], 96, 160, device="meta")
    sum(feature.sum() for feature in _feature_maps(model, image)).backward()
    return {parameter_name for parameter_name, parameter in model.named_parameters() if parameter.grad is None}


@torch.no_grad()
def _for_any_size(name: str, in_channels: int) -> tuple[dict[str, object], int]:
    """Options with which a model takes images of any size, or else of any multiple of a number; and that number or 0.

    Raises:
        InputError: there are none.
    """
    error = None
    channels = {"in_chans": in_channels}
    for options in (channels, {**channels, "dynamic_img_size": True}):
        for size, divisibility in (((101, 135), 0), ((96, 160), 32)):
            try:
                model = _on_meta(name, **options)
                features = _feature_maps(model, torch.zeros(1, in_channels, *size, device="meta"))
            except _REFUSALS as refusal:
                error = error or refusal
                continue
            strides = model.feature_info.reduction()
            # Models that round down leave out the rim of an image that is not a multiple of their strides.
            if all(y.shape[2:] == tuple(-(-side // s) for side in size) for y, s in zip(features, strides)):
                return options, divisibility
            error = error or "they do not cover the image"
    raise InputError(
        f"MODEL.TIMM.NAME: {name!r} gives feature maps only for images of its own size ({error}). Choose another model."
    )


def timm_from_config(cfg: CfgNode, input_shape: ShapeSpec, out_features: Sequence[str]) -> TimmBackbone:
    """``MODEL.TIMM`` -> backbone with the given features, for ``input_shape.channels``."""
    options = cfg.MODEL.TIMM
    return TimmBackbone(
        options.NAME,
        out_features,
        freeze_batch_norm=options.FREEZE_BATCH_NORM,
        pretrained=options.PRETRAINED,
        activation_checkpointing=options.ACTIVATION_CHECKPOINTING,
        freeze_at=cfg.MODEL.BACKBONE.FREEZE_AT,
        in_channels=input_shape.channels,
    )


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """``MODEL.TIMM`` -> backbone with the features that ``MODEL.CODETR.IN_FEATURES`` names."""
    return timm_from_config(cfg, input_shape, cfg.MODEL.CODETR.IN_FEATURES)
