"""What detectron2's ResNet lacks."""

from detectron2.modeling.backbone import ResNet
from torch import Tensor
from torch.utils.checkpoint import checkpoint

__all__ = ["CheckpointedResNet"]


class CheckpointedResNet(ResNet):
    """detectron2's ResNet whose blocks are recomputed in the backward pass, to save memory. Names stay the same.

    Args:
        resnet: what :func:`detectron2.modeling.backbone.build_resnet_backbone` gives; its blocks become this one's.
    """

    PUBLISHED_NAMES = [  # torchvision's
        ("backbone.bn1.{rest}", "stem.conv1.norm.{rest}"),
        ("backbone.conv1.{rest}", "stem.conv1.{rest}"),
        *(
            (f"backbone.layer{stage}.{{n}}.{published}.{{rest}}", f"res{stage + 1}.{{n}}.{ours}.{{rest}}")
            for stage in (1, 2, 3, 4)
            for published, ours in (
                *((f"bn{i}", f"conv{i}.norm") for i in (1, 2, 3)),
                *((f"conv{i}", f"conv{i}") for i in (1, 2, 3)),
                ("downsample.1", "shortcut.norm"),
                ("downsample.0", "shortcut"),
            )
        ),
    ]

    def __init__(self, resnet: ResNet):
        stages = [list(getattr(resnet, name)) for name in resnet.stage_names]
        super().__init__(resnet.stem, stages, out_features=list(resnet.output_shape()))

    def forward(self, x: Tensor) -> dict[str, Tensor]:
        """[B, 3, H, W] images -> the maps of the features by name."""
        x = self.stem(x)
        outputs = {"stem": x}
        for name in self.stage_names:
            for block in getattr(self, name):
                x = checkpoint(block, x, use_reentrant=False)
            outputs[name] = x
        return {name: outputs[name] for name in self.output_shape()}
