"""Evaluation of detections."""

from .evaluator import DetectionEvaluator, average_precisions, evaluation_style, to_coco_results

__all__ = ["DetectionEvaluator", "average_precisions", "evaluation_style", "to_coco_results"]
