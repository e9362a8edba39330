"""Masks of large pictures -> COCO's run-length encoding."""

from collections.abc import Sequence

import numpy as np
from pycocotools import mask as mask_util

__all__ = ["encode_mask"]


def encode_mask(mask: np.ndarray, box: Sequence[float]) -> dict:
    """What pycocotools' ``encode`` gives, in the time that the box takes, and not the picture.

    Args:
        mask: [H, W] bool, False outside the box and the pixels that it touches.
        box: xyxy in pixels.

    Returns:
        ``{"size": [H, W], "counts": str}``.
    """
    height, width = mask.shape
    left, top = np.floor(box[:2]).astype(int).clip(0)
    right, bottom = np.ceil(box[2:]).astype(int)
    # Runs go down the columns. A row of zeros below ends each run with its column.
    columns = np.pad(mask[top:bottom, left:right].T, ((0, 0), (0, 1))).astype(np.int8)
    places = np.flatnonzero(np.diff(columns.ravel(), prepend=0))  # where runs start and end
    places = (left + places // columns.shape[1]) * height + top + places % columns.shape[1]
    # A run that reaches the bottom goes on at the top of the next column, whose start is its end.
    places, times = np.unique(places, return_counts=True)
    places = places[(times == 1) & (places < height * width)]
    counts = np.diff(places, prepend=0, append=height * width)
    encoded = mask_util.frPyObjects({"size": [height, width], "counts": counts.tolist()}, height, width)
    return {"size": [height, width], "counts": encoded["counts"].decode()}
