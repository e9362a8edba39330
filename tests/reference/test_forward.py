"""Inference: features, predictions and detections equal those of the published implementation."""

import re

import numpy as np
import pytest
import torch

from tests.reference.recordings import subsample

pytestmark = pytest.mark.slow  # seconds for each recording

TOLERANCE = 1e-4  # features, logits, normalised boxes
PIXELS = 1e-2
DETECTIONS = re.compile(r"(det|det_nonms|roi_det|atss_det)_(boxes|scores|labels)_\d+|proposals_\d+")

# What our model is given, and what has a test of its own.
GIVEN = {"roi_in", "mask_det_indices", "mask_rois", "mask_labels", "masks"}


def test_arrays(forward):
    """Every recorded array that is not a list of detections."""
    recorded, meta, ours = forward
    names = [name for name in recorded if not DETECTIONS.fullmatch(name) and name not in GIVEN]
    assert names
    problems = []
    for name in names:
        full = ours[name]
        assert list(full.shape) == meta["full_shape"][name], name
        value, expected = subsample(full, meta["subsample"][name]), recorded[name]
        if expected.dtype == torch.int64:
            if not torch.equal(value, expected):
                problems.append(f"{name}: other values")
            continue
        finite = torch.isfinite(expected)
        assert torch.equal(value[~finite], expected[~finite]), name
        error = (value - expected)[finite].abs().max().item()
        mean, std, *_ = meta["stats_mean_std_min_max_l2norm_of_full"].get(name, [None, None])
        if mean is not None:
            rest = full[torch.isfinite(full)].double()
            error = max(error, abs(rest.mean().item() - mean), abs(rest.std().item() - std))
        if error > TOLERANCE:
            problems.append(f"{name}: differs by {error:.2e}")
    assert not problems, problems


def match_detections(boxes, scores, labels, expected_boxes, expected_scores, expected_labels):
    """Pair every expected detection with one of ours of the same label and box; both ways, each used once."""
    assert len(boxes) == len(expected_boxes)
    free = torch.ones(len(boxes), dtype=torch.bool)
    for box, score, label in zip(expected_boxes, expected_scores, expected_labels):
        distance = (boxes - box).abs().amax(1) + (scores - score).abs()
        distance[(labels != label) | ~free] = float("inf")
        best = distance.argmin()
        assert (boxes[best] - box).abs().max() < PIXELS and (scores[best] - score).abs() < TOLERANCE
        assert labels[best] == label and free[best]
        free[best] = False


@pytest.mark.parametrize("prefix", ["det", "det_nonms", "roi_det", "atss_det"])
def test_detections(forward, prefix):
    """Final detections of each head; all but ``det_nonms`` in pixels of the original image."""
    recorded, meta, ours = forward
    images = [i for i in range(len(meta["image_seeds"])) if f"{prefix}_boxes_{i}" in recorded]
    if not images:
        pytest.skip(f"{prefix} is not in this recording")
    for i in images:
        # The auxiliary heads were recorded with fewer detections than the query head.
        kept = slice(None if prefix == "det" else len(recorded[f"{prefix}_boxes_{i}"]))
        boxes = ours[f"{prefix}_boxes_{i}"][kept]
        if prefix != "det_nonms":
            boxes = boxes / torch.tensor(meta["scale_factors_wh"][i] * 2)
        match_detections(
            boxes,
            ours[f"{prefix}_scores_{i}"][kept],
            ours[f"{prefix}_labels_{i}"][kept],
            *(recorded[f"{prefix}_{part}_{i}"] for part in ("boxes", "scores", "labels")),
        )


def test_proposals(forward):
    """The region proposals at test time."""
    recorded, meta, ours = forward
    names = [name for name in recorded if name.startswith("proposals_")]
    if not names:
        pytest.skip("this recording holds no proposals")
    for name in names:
        expected, full = recorded[name], ours[name]
        assert list(full.shape) == meta["full_shape"][name]
        value = full[: len(expected) + 5]  # neighbours in rank may swap
        distance = (value[:, None, :4] - expected[None, :, :4]).abs().amax(-1)
        scores = (value[:, None, 4] - expected[None, :, 4]).abs()
        assert ((distance < PIXELS) & (scores < TOLERANCE)).any(0).all()


def test_masks(forward):
    """Masks in the original image, pixel by pixel but for a few at the threshold."""
    recorded, _, ours = forward
    masks = ours["masks"].flatten(1).numpy()
    expected = np.unpackbits(recorded["masks"].numpy(), axis=1)[:, : masks.shape[1]]
    assert expected.sum() > 1000 and (masks != expected).sum() <= 5
