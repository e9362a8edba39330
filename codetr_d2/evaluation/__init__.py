"""Evaluators that detectron2 does not have, and which one a dataset asks for."""

from detectron2.evaluation import COCOEvaluator

from .lvis import LVISEvaluator, lvis_ap
from .mask_scores import MaskScores

__all__ = ["EVALUATORS", "LVISEvaluator", "MaskCOCOEvaluator", "MaskLVISEvaluator", "MaskScores", "lvis_ap"]


class MaskCOCOEvaluator(MaskScores, COCOEvaluator):
    """detectron2's :class:`COCOEvaluator` with :class:`MaskScores`."""


class MaskLVISEvaluator(MaskScores, LVISEvaluator):
    """:class:`LVISEvaluator` with :class:`MaskScores`."""


EVALUATORS = {"coco": MaskCOCOEvaluator, "lvis": MaskLVISEvaluator}  # by a dataset's evaluator_type
