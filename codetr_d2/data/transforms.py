"""Augmentations beside detectron2's."""

import numpy as np
from detectron2.data import transforms as T

__all__ = ["ResizeShortestEdge"]


class ResizeShortestEdge(T.ResizeShortestEdge):
    """detectron2's, which gives thin pictures a side of no pixels: at least one."""

    def get_transform(self, image: np.ndarray) -> T.Transform:
        resize = super().get_transform(image)
        if isinstance(resize, T.ResizeTransform) and min(resize.new_h, resize.new_w) < 1:
            return T.ResizeTransform(resize.h, resize.w, max(1, resize.new_h), max(1, resize.new_w), resize.interp)
        return resize
