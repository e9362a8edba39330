"""Detections in pictures and videos, from the weights of any Co-DETR."""

from .detections_file import DetectionsFile, cannot_be_written
from .files import MediaFile, find_media, name_drawings
from .predictor import Predictor

__all__ = [
    "DetectionsFile",
    "MediaFile",
    "Predictor",
    "cannot_be_written",
    "find_media",
    "name_drawings",
]
