import numpy as np
import pytest
from pycocotools import mask as mask_util

from codetr_d2.evaluation.mask_encoding import encode_mask

BOXES = [(3.2, 4.9, 20.5, 17.1), (0, 0, 40, 30), (10, 0, 25, 30), (0, 29.5, 40, 30), (-3, -2, 45, 31), (39, 29, 40, 30)]


@pytest.mark.parametrize("box", [*BOXES, (5, 5, 5, 5)])
@pytest.mark.parametrize("share", [0.0, 0.1, 0.5, 0.9, 1.0])
def test_equals_the_encoding_of_the_whole_picture(box, share):
    left, top = np.floor(box[:2]).astype(int).clip(0)
    right, bottom = np.ceil(box[2:]).astype(int)
    mask = np.zeros((30, 40), bool)
    noise = np.random.default_rng(0).random(mask.shape) < share
    mask[top:bottom, left:right] = noise[top:bottom, left:right]
    expected = mask_util.encode(np.asfortranarray(mask, np.uint8))
    assert encode_mask(mask, box) == {"size": [30, 40], "counts": expected["counts"].decode()}
