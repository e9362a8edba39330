"""Datasets, and the way from an image file to the model's input."""

from .datasets import class_names, load_datasets, register_datasets, register_metadata
from .images import check_image_file, is_image_file, read_image
from .mapper import CoDETRDatasetMapper, build_augmentations

__all__ = [
    "CoDETRDatasetMapper",
    "build_augmentations",
    "check_image_file",
    "class_names",
    "is_image_file",
    "load_datasets",
    "read_image",
    "register_datasets",
    "register_metadata",
]
