"""Where decoder queries come from."""

from .positives import PositiveQueries, SelectedSamples, select_samples
from .proposals import TwoStageProposals, prior_boxes

__all__ = ["PositiveQueries", "SelectedSamples", "TwoStageProposals", "prior_boxes", "select_samples"]
