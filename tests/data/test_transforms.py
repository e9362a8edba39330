import numpy as np
import pytest
from detectron2.data import transforms as T

from codetr_d2.data.transforms import ResizeShortestEdge


@pytest.mark.parametrize("side, longest", [(800, 1333), (128, 192), (0, 100), (7, 5)])
def test_sizes_are_those_of_detectron2_but_for_zero(side, longest):
    sizes = np.random.default_rng(0).integers(1, 3000, (300, 2)).tolist()
    for height, width in [*sizes, (1, 1), (2, 6000), (6000, 2), (1, 30000), (480, 640)]:
        # Of no memory: only its shape is read.
        image = np.broadcast_to(np.uint8(0), (height, width, 3))
        ours = ResizeShortestEdge([side, side], longest).get_transform(image)
        theirs = T.ResizeShortestEdge([side, side], longest).get_transform(image)
        assert type(ours) is type(theirs)
        if isinstance(ours, T.ResizeTransform):
            assert (ours.new_h, ours.new_w) == (max(1, theirs.new_h), max(1, theirs.new_w))


@pytest.mark.parametrize("style", ["range", "choice"])
def test_a_thin_picture_keeps_a_pixel(style):
    image = np.random.default_rng(0).integers(0, 256, (2, 6000, 3), dtype=np.uint8)
    resize = ResizeShortestEdge([400, 500], 1333, style).get_transform(image)
    resized = resize.apply_image(image)
    assert resized.shape == (1, 1333, 3)
    np.testing.assert_allclose(resize.apply_box(np.array([[0, 0, 6000.0, 2]])), [[0, 0, 1333, 1]])
