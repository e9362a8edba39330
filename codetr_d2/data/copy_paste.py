"""Copy-paste (Ghiasi et al., CVPR 2021): objects of one image, cut out by their masks, on top of another image."""

import numpy as np
import torch
from detectron2.structures import BitMasks, Boxes, Instances

__all__ = ["choose_objects", "paste_objects"]

# An object that is partly covered stays if its box has moved by at most so many pixels on every side, or if more than
# so many of its pixels are left.
MAX_BOX_SHIFT = 10.0
MIN_MASK_AREA = 300


def choose_objects(instances: Instances, max_num: int) -> Instances:
    """A random choice, from numpy's global generator, of a random number of the objects: none to ``max_num``."""
    number = np.random.randint(min(len(instances), max_num) + 1)
    return instances[torch.from_numpy(np.random.permutation(len(instances))[:number])]


def paste_objects(
    image: np.ndarray, instances: Instances, source_image: np.ndarray, source: Instances
) -> tuple[np.ndarray, Instances]:
    """Put all objects of ``source`` on top of an image of the same size.

    Args:
        image: [H, W, C].
        instances: ``gt_boxes``, ``gt_classes`` and ``gt_masks`` (``BitMasks`` [N, H, W]) of ``image``.
        source_image: [H, W, C].
        source: those of ``source_image``.

    Returns:
        The new image, and its objects: those of ``instances`` that remain to be seen, with boxes drawn tight around
        what is left of their masks, then those of ``source``. The arguments stay as they are.
    """
    if len(source) == 0:
        return image, instances
    pasted = source.gt_masks.tensor.any(0)
    image = np.where(pasted.numpy()[:, :, None], source_image, image)
    if len(instances) == 0:
        return image, source

    masks = BitMasks(instances.gt_masks.tensor & ~pasted)
    boxes = masks.get_bounding_boxes().tensor
    area = masks.tensor.flatten(1).sum(1)
    shift = (boxes - instances.gt_boxes.tensor).abs().amax(1)
    seen = (area > 0) & ((shift <= MAX_BOX_SHIFT) | (area > MIN_MASK_AREA))
    left = Instances(instances.image_size, gt_boxes=Boxes(boxes), gt_classes=instances.gt_classes, gt_masks=masks)
    return image, Instances.cat([left[seen], source])
