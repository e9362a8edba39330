"""Whether an exported file finds what the model finds: the same detections, the same AP."""

import contextlib
import logging
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from detectron2.config import CfgNode
from detectron2.evaluation import inference_on_dataset
from detectron2.structures import Instances
from torch import Tensor, nn

from ..data import CoDETRDatasetMapper, load_datasets
from ..data.loader import build_test_loader
from ..evaluation import DetectionEvaluator
from ..modeling.query_heads import TwoStageQueryHead
from ..modeling.structures import EncoderProposals

__all__ = ["Difference", "average_precision", "compare_detections", "compare_on_pictures"]

logger = logging.getLogger(__name__)

MAX_BOX = 0.5  # pixels
MAX_SCORE = 1e-3


@dataclass
class Difference:
    """How far the detections of two models are apart.

    Attributes:
        number: of detections that were compared.
        missing: those that the other model has none for, of the same class with a score and a box near enough.
        box: the largest distance of a corner's coordinate, in pixels, of those that are in both.
        score: the largest difference of the scores of these.
        mask: the largest share of a mask's pixels (of both together) that differ, of these; None without masks.
    """

    number: int = 0
    missing: int = 0
    box: float = 0.0
    score: float = 0.0
    mask: float | None = None

    def add(self, other: "Difference") -> None:
        self.number += other.number
        self.missing += other.missing
        self.box, self.score = max(self.box, other.box), max(self.score, other.score)
        if other.mask is not None:
            self.mask = max(self.mask or 0.0, other.mask)

    def __str__(self) -> str:
        masks = "" if self.mask is None else f", masks by {self.mask:.2%} of their pixels"
        return (
            f"{self.number} detections, {self.missing} without their like; the others differ by at most "
            f"{self.box:.2g} px and {self.score:.2g} in the score{masks}"
        )


def compare_detections(one: Instances, other: Instances) -> Difference:
    """Look for the like of each detection of both among those of the other: the same class, a score within 0.001, a
    box within half a pixel.

    Both are the best of many, so that the last ones may be cut off in one of them: detections whose score is within
    0.001 of the least are not missed.
    """
    difference = Difference()
    pairs = torch.cdist(one.pred_boxes.tensor, other.pred_boxes.tensor, p=float("inf"))  # [N, M]
    scores = (one.scores[:, None] - other.scores[None]).abs()
    alike = (one.pred_classes[:, None] == other.pred_classes[None]) & (scores <= MAX_SCORE) & (pairs <= MAX_BOX)
    for mine, has in ((one, alike.any(1)), (other, alike.any(0))):
        counts = mine.scores > mine.scores.min() + MAX_SCORE if len(mine) else has
        difference.number += int((counts | has).sum())
        difference.missing += int((counts & ~has).sum())
    rows = alike.any(1).nonzero().flatten()
    if len(rows):
        nearest = (pairs + scores).masked_fill(~alike, float("inf"))[rows].argmin(1)
        difference.box = float(pairs[rows, nearest].max())
        difference.score = float(scores[rows, nearest].max())
        if one.has("pred_masks"):
            a, b = one.pred_masks[rows].flatten(1), other.pred_masks[nearest].flatten(1)
            difference.mask = float(((a ^ b).sum(1) / (a | b).sum(1).clamp(min=1)).max())
    return difference


@dataclass
class _Choice:
    """How the proposals that became queries differ from those that the model would choose.

    Attributes:
        number: of places in the order with another token.
        score: the largest difference between the logits at a place.
    """

    number: int = 0
    score: float = 0.0

    def __str__(self) -> str:
        if not self.number:
            return ""
        return f"; {self.number} proposals were chosen otherwise, whose logits differ by at most {self.score:.2g}"


@contextlib.contextmanager
def _same_proposals(model: nn.Module, index: np.ndarray | None) -> Iterator[_Choice]:
    """Let a two-stage model take the tokens ``index`` [B, Q] for its queries, and say how its own choice differs.

    Of two tokens whose scores are equal but for rounding, either may come first, and the queries of both are others
    then: the content of a query depends on its place.
    """
    choice = _Choice()
    head = getattr(model, "query_head", None)
    if index is None or not isinstance(head, TwoStageQueryHead):
        yield choice
        return

    def best_proposals(proposals: EncoderProposals) -> Tensor:
        given = torch.from_numpy(index)
        scores = head.proposal_scores(proposals)
        best, own = scores.topk(given.shape[1], dim=1)
        given_scores = scores.gather(1, given)
        choice.number = int((own != given).sum())
        choice.score = float(torch.where(best == given_scores, 0.0, (best - given_scores).abs()).max())
        return given

    head.best_proposals = best_proposals  # of this object alone
    try:
        yield choice
    finally:
        del head.best_proposals


@torch.no_grad()
def compare_on_pictures(model: nn.Module, exported: nn.Module, batches: Iterable[Sequence[Tensor]]) -> list[str]:
    """Compare on batches of pictures [C, H, W], with values 0 to 255, and print a line for each.

    Returns:
        What is wrong, a line for each batch that differs; empty where all is well.
    """
    problems, number = [], 0
    for images in batches:
        inputs = [{"image": image} for image in images]
        found = exported(inputs)
        with _same_proposals(model, getattr(exported, "proposals", None)) as choice:
            expected = model(inputs)
        difference = Difference()
        for one, other in zip(expected, found):
            difference.add(compare_detections(one["instances"], other["instances"]))
        sizes = " and ".join(f"{image.shape[-1]} x {image.shape[-2]}" for image in images)
        print(f"  {sizes}: {difference}{choice}", flush=True)
        number += difference.number
        if difference.missing or choice.score > MAX_SCORE:
            problems.append(f"pictures of {sizes}: {difference}{choice}")
    if not number:
        problems.append("nothing was detected in any picture, so that nothing was compared: give others by --pictures")
    return problems


def average_precision(cfg: CfgNode, detector: nn.Module) -> dict[str, float]:
    """AP on the first test dataset of the config, by task ("bbox", "segm"), in percent."""
    name = cfg.DATASETS.TEST[0]
    loader = build_test_loader(cfg, load_datasets(cfg, [name], False), CoDETRDatasetMapper(cfg, False))
    # Without a folder: the run's own detections stay what they are.
    results = inference_on_dataset(detector, loader, DetectionEvaluator(name))
    return {task: values["AP"] for task, values in results.items() if np.isfinite(values.get("AP", np.nan))}
