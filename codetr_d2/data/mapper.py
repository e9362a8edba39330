"""From a dataset dict to the model's input: reading, augmenting, boxes."""

import copy

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.data import DatasetMapper
from detectron2.data import detection_utils as utils
from detectron2.data import transforms as T

from .images import read_image

__all__ = ["CoDETRDatasetMapper", "build_augmentations"]

# Short sides that an image is resized to before it is cropped (DETR, arXiv 2005.12872, section 4).
CROP_SHORT_SIDES = (400, 500, 600)


def build_augmentations(cfg: CfgNode, is_train: bool) -> list[T.Augmentation]:
    """The augmentations of the config, in order.

    detectron2's: resize the shorter side (``INPUT.MIN_SIZE_*``, ``INPUT.MAX_SIZE_*``), then flip.
    ``INPUT.CROP.ENABLED`` adds DETR's crop in training: with probability 1/2 the image is first resized to a shorter
    side of 400, 500 or 600 pixels and a random part of it cut out, of ``INPUT.CROP.TYPE`` and ``INPUT.CROP.SIZE`` (as
    published: "absolute_range", [384, 600]).
    """
    augmentations = utils.build_augmentation(cfg, is_train)
    if is_train and cfg.INPUT.CROP.ENABLED:
        resize = T.ResizeShortestEdge(CROP_SHORT_SIDES, sample_style="choice")
        crop = T.RandomCrop(cfg.INPUT.CROP.TYPE, cfg.INPUT.CROP.SIZE)
        augmentations.insert(0, T.RandomApply(T.AugmentationList([resize, crop]), prob=0.5))
    return augmentations


class CoDETRDatasetMapper(DatasetMapper):
    """detectron2's :class:`DatasetMapper` for pictures of any kind, with DETR's crop.

    Called with a dataset dict, it returns that dict with ``image`` ([C, H, W] uint8, channels as ``INPUT.FORMAT``) and,
    in training, ``instances`` (``gt_boxes`` xyxy in pixels of ``image``, ``gt_classes``) in place of ``annotations``.
    Crowd boxes and those that a crop cuts away are dropped; an image that keeps none is still used. With
    ``MODEL.MASK_ON`` an image with objects has ``gt_masks`` too, of the type that ``INPUT.MASK_FORMAT`` says, and after
    a crop its boxes are those of what is left of the masks.

    Raises:
        InputError: the image is missing, damaged, or of another size than its annotation says.
    """

    @classmethod
    def from_config(cls, cfg: CfgNode, is_train: bool = True) -> dict:
        return {**super().from_config(cfg, is_train), "augmentations": build_augmentations(cfg, is_train)}

    def __call__(self, dataset_dict: dict) -> dict:
        dataset_dict = copy.deepcopy(dataset_dict)  # modified below
        size = (dataset_dict["width"], dataset_dict["height"]) if "width" in dataset_dict else None
        image = read_image(dataset_dict["file_name"], self.image_format, size)
        utils.check_image_size(dataset_dict, image)  # fills in the size where the dataset has none

        aug_input = T.AugInput(image)
        transforms = self.augmentations(aug_input)
        image = aug_input.image  # [H, W, C]
        # One tensor goes between processes through shared memory; anything else would be pickled.
        dataset_dict["image"] = torch.from_numpy(np.ascontiguousarray(image.transpose(2, 0, 1)))

        if not self.is_train:
            dataset_dict.pop("annotations", None)
        elif "annotations" in dataset_dict:
            self._transform_annotations(dataset_dict, transforms, image.shape[:2])
        return dataset_dict

    def _transform_annotations(
        self, dataset_dict: dict, transforms: T.TransformList, image_shape: tuple[int, int]
    ) -> None:
        """See the base class, which cannot recompute the boxes of an image that has no mask."""
        if any(x.get("iscrowd", 0) == 0 for x in dataset_dict["annotations"]):
            super()._transform_annotations(dataset_dict, transforms, image_shape)
        else:
            dataset_dict.pop("annotations")
            dataset_dict["instances"] = utils.annotations_to_instances([], image_shape)
