import pytest
import torch
from torch.nn import functional as F

from codetr_d2.modeling.structures import FeaturePyramid


@pytest.mark.parametrize("batch", [1, 2])
def test_maps_are_the_tokens_and_channels_last(batch):
    shapes = [(4, 6), (2, 3), (1, 2)]
    tokens = torch.randn(batch, sum(h * w for h, w in shapes), 8)
    pyramid = FeaturePyramid(
        tokens=tokens,
        padding_mask=torch.zeros(tokens.shape[:2], dtype=torch.bool),
        shapes=shapes,
        strides=[8, 16, 32],
        image_sizes=[(32, 48)] * batch,
        batch_shape=(32, 48),
        padded_sizes=[(32, 48)] * batch,
        valid_ratios=torch.ones(batch, 3, 2),
    )
    maps = pyramid.maps()
    assert [tuple(x.shape) for x in maps] == [(batch, 8, h, w) for h, w in shapes]
    assert torch.equal(torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1), tokens)
    assert maps[1].untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
    for x in maps:
        # Convolutions keep the layout only if they take the view for channels last.
        assert F.conv2d(x, torch.ones(8, 8, 1, 1)).is_contiguous(memory_format=torch.channels_last)
