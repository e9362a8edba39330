"""Assignment by the largest intersection over union, the rule of Faster R-CNN's region proposal network."""

import torch
from detectron2.modeling.matcher import Matcher
from torch import Tensor

__all__ = ["MaxIoUMatcher"]


class MaxIoUMatcher(Matcher):
    """detectron2's ``Matcher`` with another rule for the objects that no prediction overlaps well.

    After the thresholds have had their say, each ground truth also claims the predictions that overlap it best (all
    that tie), if that overlap is at least ``min_pos_iou`` and not 0. A claimed prediction is positive and belongs to
    the ground truth that claims it, the last one where there are several. detectron2's own
    ``allow_low_quality_matches`` has no minimum, and leaves the claimed prediction with the ground truth that it
    overlaps most.

    Source: Faster R-CNN, section 3.1.2, rule (i), in the form that Co-DETR was published with.
    """

    def __init__(self, thresholds: list[float], labels: list[int], min_pos_iou: float) -> None:
        """
        Args:
            thresholds: ascending overlaps that separate the strata of predictions.
            labels: label of each stratum, one more than ``thresholds``: 0 negative, -1 ignored, 1 positive.
            min_pos_iou: the least overlap with which a ground truth claims its best predictions.
        """
        super().__init__(list(thresholds), list(labels), allow_low_quality_matches=False)
        self.min_pos_iou = min_pos_iou

    def __call__(self, match_quality_matrix: Tensor) -> tuple[Tensor, Tensor]:
        """
        Args:
            match_quality_matrix: [M, N] overlaps of M ground truths with N predictions, none negative.

        Returns:
            [N] int64, the ground truth of each prediction (of no meaning where it isn't positive), and
            [N] int8, its label: 0 negative, -1 ignored, 1 positive.
        """
        matches, labels = super().__call__(match_quality_matrix)
        if match_quality_matrix.numel() == 0:
            return matches, labels
        best = match_quality_matrix.amax(dim=1, keepdim=True)
        gt_index, prediction_index = torch.nonzero(
            (match_quality_matrix == best) & (best >= self.min_pos_iou) & (best > 0), as_tuple=True
        )
        claimed_by = torch.full_like(matches, -1).scatter_reduce_(0, prediction_index, gt_index, "amax")
        claimed = claimed_by >= 0
        labels[claimed] = 1
        return torch.where(claimed, claimed_by, matches), labels
