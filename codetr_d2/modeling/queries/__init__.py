"""Where decoder queries come from."""

from .denoising import ContrastiveDenoising, DenoisingNoise
from .positives import PositiveQueries, SelectedSamples, select_samples
from .proposals import TwoStageProposals, gather_tokens, prior_boxes

__all__ = [
    "ContrastiveDenoising",
    "DenoisingNoise",
    "PositiveQueries",
    "SelectedSamples",
    "TwoStageProposals",
    "gather_tokens",
    "prior_boxes",
    "select_samples",
]
