import pytest
import torch
from torch.nn import functional as F

from codetr_d2.modeling.pyramid import FeaturePyramid, Geometry, build_pyramid


@pytest.mark.parametrize("batch", [1, 2])
def test_maps_are_the_tokens_and_channels_last(batch):
    shapes = [(4, 6), (2, 3), (1, 2)]
    tokens = torch.randn(batch, sum(h * w for h, w in shapes), 8)
    pyramid = FeaturePyramid(tokens, Geometry.build(shapes, [8, 16, 32], [(32, 48)] * batch, (32, 48)))
    maps = pyramid.maps()
    assert [tuple(x.shape) for x in maps] == [(batch, 8, h, w) for h, w in shapes]
    assert torch.equal(torch.cat([x.flatten(2).transpose(1, 2) for x in maps], dim=1), tokens)
    assert maps[1].untyped_storage().data_ptr() == tokens.untyped_storage().data_ptr()
    for x in maps:
        # Convolutions keep the layout only if they take the view for channels last.
        assert F.conv2d(x, torch.ones(8, 8, 1, 1)).is_contiguous(memory_format=torch.channels_last)


def test_pyramid():
    levels = [torch.arange(2 * 4 * 24.0).view(2, 4, 4, 6), torch.randn(2, 4, 2, 3)]
    pyramid = build_pyramid(levels, [8, 16], [(32, 48), (17, 24)], (32, 48))
    for ours, expected in zip(pyramid.maps(), levels):
        assert torch.equal(ours, expected)
    geometry = pyramid.geometry
    assert geometry.shapes == [(4, 6), (2, 3)] and geometry.level_sizes == [24, 6]
    mask = geometry.padding_mask[1, :24].view(4, 6)  # cells start at pixels 0, 8, 16, 24; the image has 17 rows
    assert (~mask).sum() == 9 and not mask[:3, :3].any()
    torch.testing.assert_close(geometry.valid_ratios[1, 0], torch.tensor([3 / 6, 3 / 4]))
    assert geometry.image_sizes_xyxy.tolist() == [[48, 32, 48, 32], [24, 17, 24, 17]]


def test_geometry_of_a_further_level():
    geometry = Geometry.build([(8, 12), (4, 6)], [8, 16], [(64, 96), (33, 48)], (64, 96))
    coarser = geometry.with_coarser_level((2, 3))
    assert coarser.shapes == [(8, 12), (4, 6), (2, 3)] and coarser.strides == [8, 16, 32]
    assert torch.equal(coarser.padding_mask[:, : 96 + 24], geometry.padding_mask)
    # Of the second image level 1 has 3 of 4 rows and 3 of 6 columns; every second one is a cell of level 2.
    assert coarser.level_padding[2][1].tolist() == [[False, False, True], [False, False, True]]
    assert geometry.shapes == [(8, 12), (4, 6)]


def test_geometry_against_full_masks():
    """Padding of levels as nearest neighbours of a mask in pixels."""
    generator = torch.Generator().manual_seed(0)
    for _ in range(50):
        height, width = torch.randint(40, 200, (2,), generator=generator).tolist()
        sizes = [(height, width)]
        sizes += [
            (int(torch.randint(1, height + 1, (1,), generator=generator)), int(torch.randint(1, width + 1, (1,))))
        ]
        shapes = [(-(-height // s), -(-width // s)) for s in (8, 16, 32)]
        geometry = Geometry.build(shapes, [8, 16, 32], sizes, (height, width))
        mask = torch.ones(2, 1, height, width)
        for x, (h, w) in zip(mask, sizes):
            x[:, :h, :w] = 0
        for shape, ours in zip(shapes, geometry.level_padding):
            assert torch.equal(ours, F.interpolate(mask, size=shape)[:, 0] > 0.5)
        assert geometry.is_padded == (len(set(sizes)) > 1)
        assert (geometry.value_mask is None) == (not geometry.is_padded)
