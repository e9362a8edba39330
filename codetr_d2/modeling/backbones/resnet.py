"""What detectron2's ResNet lacks."""

from functools import partial

from detectron2.layers import CNNBlockBase
from torch import nn
from torch.utils.checkpoint import checkpoint

__all__ = ["checkpoint_resnet_blocks"]


def checkpoint_resnet_blocks(backbone: nn.Module) -> None:
    """Recompute, from now on, each block of detectron2's ResNets below ``backbone`` in the backward pass."""
    for block in backbone.modules():
        if isinstance(block, CNNBlockBase):
            block.forward = partial(checkpoint, block.forward, use_reentrant=False)
