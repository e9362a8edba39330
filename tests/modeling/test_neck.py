import pytest
import torch
from detectron2.layers import ShapeSpec

from codetr_d2.modeling.neck import ChannelMapper


def test_levels():
    shapes = [ShapeSpec(channels=8, stride=8), ShapeSpec(channels=16, stride=16)]
    neck = ChannelMapper(shapes, out_channels=32, num_levels=4)
    levels = neck([torch.randn(2, 8, 12, 9), torch.randn(2, 16, 6, 5)])
    assert [tuple(x.shape) for x in levels] == [(2, 32, 12, 9), (2, 32, 6, 5), (2, 32, 3, 3), (2, 32, 2, 2)]
    assert neck.strides == [8, 16, 32, 64]
    # GroupNorm: every group of every image has mean 0 and variance 1 at the start.
    groups = levels[0].view(2, 16, -1)
    torch.testing.assert_close(groups.mean(-1), torch.zeros(2, 16), atol=1e-5, rtol=0)


def test_single_cell():
    """The coarsest level of a small image, alone in its batch, in training."""
    neck = ChannelMapper([ShapeSpec(channels=8, stride=8)], out_channels=32, num_levels=2).train()
    assert all(torch.isfinite(x).all() for x in neck([torch.randn(1, 8, 1, 1)]))


def test_too_few_levels():
    with pytest.raises(ValueError, match="2 features do not fit into 1 levels"):
        ChannelMapper([ShapeSpec(channels=8, stride=8)] * 2, out_channels=32, num_levels=1)
