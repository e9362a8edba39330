"""Detections in pictures, from the weights of any Co-DETR."""

from .predictor import Predictor

__all__ = ["Predictor"]
