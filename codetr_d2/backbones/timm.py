"""Any convolutional timm model as a detectron2 backbone."""

from difflib import get_close_matches

import timm
from detectron2.config import CfgNode
from detectron2.layers import ShapeSpec
from detectron2.modeling import BACKBONE_REGISTRY, Backbone
from timm.layers import freeze_batch_norm_2d
from torch import Tensor

from ..errors import InputError

__all__ = ["TimmBackbone", "build_timm_backbone"]


class TimmBackbone(Backbone):
    """Features of a timm model, named ``stride4``, ``stride8``, ``stride16``, ...

    Args:
        name: name of the timm model.
        out_features: names of the features to return; the model ends after the last of them.
        freeze_batch_norm: use the running statistics of batch norm and train none of its parameters.
        pretrained: load timm's own weights (needs network access).

    Raises:
        InputError: the name is not a timm model with feature maps, or a feature does not exist.
    """

    def __init__(self, name: str, out_features: list[str], freeze_batch_norm: bool = True, pretrained: bool = False):
        super().__init__()
        if name not in timm.list_models():
            close = get_close_matches(name, timm.list_models(), n=5)
            raise InputError(f"MODEL.TIMM.NAME: timm has no model {name!r}. Close to it: {', '.join(close) or 'none'}.")
        try:
            strides = timm.create_model(name, features_only=True).feature_info.reduction()
        except (RuntimeError, AttributeError, TypeError) as error:
            raise InputError(
                f"MODEL.TIMM.NAME: {name!r} gives no feature maps ({error}). Choose another model."
            ) from error
        index = {f"stride{stride}": i for i, stride in enumerate(strides)}
        missing = [feature for feature in out_features if feature not in index]
        if missing:
            raise InputError(f"MODEL.CODETR.IN_FEATURES: {name} has no {missing}; it has {', '.join(index)}.")
        self.out_features = list(out_features)
        indices = [index[feature] for feature in out_features]
        self.model = timm.create_model(name, features_only=True, out_indices=indices, pretrained=pretrained)
        channels, strides = self.model.feature_info.channels(), self.model.feature_info.reduction()
        self._output_shape = {
            feature: ShapeSpec(channels=c, stride=s) for feature, c, s in zip(out_features, channels, strides)
        }
        if freeze_batch_norm:
            # detectron2's FrozenBatchNorm2d would drop the activation that timm fuses into its batch norm.
            self.model = freeze_batch_norm_2d(self.model)

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] normalised images -> feature maps by name."""
        return dict(zip(self.out_features, self.model(x)))

    def output_shape(self) -> dict[str, ShapeSpec]:
        return self._output_shape


@BACKBONE_REGISTRY.register()
def build_timm_backbone(cfg: CfgNode, input_shape: ShapeSpec) -> TimmBackbone:
    """``MODEL.TIMM`` -> backbone with the features that ``MODEL.CODETR.IN_FEATURES`` names."""
    options = cfg.MODEL.TIMM
    return TimmBackbone(options.NAME, cfg.MODEL.CODETR.IN_FEATURES, options.FREEZE_BATCH_NORM, options.PRETRAINED)
