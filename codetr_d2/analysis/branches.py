"""The average precision of the detector and of each auxiliary head by itself, with and without NMS.

Source: paper, the ablation of the auxiliary branches: trained together, each of them gains too.
"""

import copy
import dataclasses
import math
from collections import defaultdict
from collections.abc import Iterable
from pathlib import Path

import torch
from detectron2.layers import batched_nms
from detectron2.structures import Instances
from torch import nn
from tqdm import tqdm

from ..data.datasets import annotated_images
from ..evaluation.evaluator import average_precisions, evaluation_style, to_coco_results
from ..modeling.auxiliary.dense import DenseHead
from ..modeling.auxiliary.roi import ROIHead
from ..modeling.meta_arch import clip_to_image, rescale
from ..modeling.postprocess import detections_from_queries
from . import plots
from .models import AnalysedModel, images
from .results import write_rows

__all__ = ["DETECTOR", "branch_detections", "head_without_nms", "measure_branches"]

DETECTOR = "detector"
DETECTOR_NMS_THRESH = 0.7  # IoU, for a detector whose config has no soft-NMS


def head_without_nms(head: nn.Module) -> nn.Module | None:
    """A copy of an auxiliary head in which no detection suppresses, weakens or moves another.

    What is detected are then the best pairs of box and class of those that NMS would have chosen from. The proposals of
    the ROI head still go through their own NMS: without, there is no such head.

    Returns:
        None for a head from outside the package, of which it is not known how to do so.
    """
    if not isinstance(head, (DenseHead, ROIHead)):
        return None
    head = copy.deepcopy(head)
    if isinstance(head, ROIHead):
        head.roi_heads.soft_nms = False
        head.roi_heads.box_predictor.test_nms_thresh = math.inf
    else:
        head.soft_nms, head.nms_thresh = False, math.inf
        head.score_voting = False  # PAA's
    return head


def detector_detections(model: nn.Module, memory, has_nms: bool) -> Instances:
    """The detector's own detections of the only image of a batch, in pixels of the network input.

    With NMS these are what soft-NMS makes of them, where the config has it (Co-DINO); otherwise as many pairs of query
    and class as there are queries go through NMS by class.
    """
    head, output = model.query_head, model.predict(memory)
    if has_nms and head.soft_nms_thresh > 0:
        return head.finish(output, memory)[0]
    logits, boxes, sizes = output.logits[-1], output.boxes[-1], memory.geometry.image_sizes
    found = detections_from_queries(logits, boxes, sizes, logits.shape[1] if has_nms else head.max_detections)[0]
    if has_nms:
        found = found[batched_nms(found.pred_boxes.tensor, found.scores, found.pred_classes, DETECTOR_NMS_THRESH)]
    return found[: head.max_detections]


@torch.no_grad()
def branch_detections(model: nn.Module, model_input: dict, without_nms: dict[str, nn.Module]) -> dict:
    """The detections of every branch on one image.

    Args:
        model: in eval mode.
        model_input: as the model takes it.
        without_nms: what :func:`head_without_nms` gives for each auxiliary head by its name, if anything.

    Returns:
        By (name of the branch, whether there is NMS) :class:`Instances` in pixels of the original image.
    """
    memory = model.encode(model.features(model.preprocess([model_input])))
    found = {(DETECTOR, has_nms): detector_detections(model, memory, has_nms) for has_nms in (False, True)}
    if model.auxiliary_heads:
        pyramid = model.auxiliary_pyramid(memory)
        for name, head in without_nms.items():
            found[name, False] = head.inference(pyramid)[0]
        for name, head in model.auxiliary_heads.items():
            found[name, True] = head.inference(pyramid)[0]
    return {key: rescale(clip_to_image(x, model_input["image"]), model_input) for key, x in found.items()}


def measure_branches(models: Iterable[AnalysedModel], num_images: int, output: Path) -> list[dict]:
    """Evaluate every branch of every model on the first images of the test dataset, by the dataset's own rules.

    Writes ``branches.png``, ``branches.json`` and ``branches.csv``.

    Args:
        models: what to compare.
        num_images: how many images of the test dataset; those that are left out count for nothing.
        output: a folder that exists.

    Returns:
        A row for each model and branch: ``model``, ``branch``, ``AP_without_NMS``, ``AP_with_NMS`` (of boxes, in
        percent; None where it is not known how to leave NMS out), ``images``.
    """
    rows = []
    for analysed in models:
        model, dataset_name = analysed.model, analysed.cfg.DATASETS.TEST[0]
        copies = {name: head_without_nms(head) for name, head in model.auxiliary_heads.items()}
        without_nms = {name: head for name, head in copies.items() if head is not None}
        results, seen = defaultdict(list), set()
        for x in tqdm(images(analysed, num_images), desc=analysed.name):
            seen.add(x["image_id"])
            for key, found in branch_detections(model, x, without_nms).items():
                results[key] += to_coco_results(found.to("cpu"), x["image_id"])
        dataset = annotated_images(dataset_name, analysed.cfg.MODEL.CODETR.NUM_CLASSES)
        dataset = dataclasses.replace(dataset, records=[x for x in dataset.records if x["image_id"] in seen])

        style = evaluation_style(dataset_name)
        ap = {key: average_precisions(dataset, found, "bbox", style)["AP"] for key, found in results.items()}
        rows += [
            {
                "model": analysed.name,
                "branch": name,
                "AP_without_NMS": ap.get((name, False)),
                "AP_with_NMS": ap[name, True],
                "images": len(seen),
            }
            for name in (DETECTOR, *model.auxiliary_heads)
        ]
    write_rows(output, "branches", rows)
    panels = {
        f"box AP {label}, in percent": {
            model: {row["branch"]: row[key] for row in rows if row["model"] == model and row[key] is not None}
            for model in dict.fromkeys(row["model"] for row in rows)
        }
        for label, key in (("without NMS", "AP_without_NMS"), ("with NMS", "AP_with_NMS"))
    }
    plots.draw_bars(
        output / "branches.png", panels, title=f"Each branch by itself, {rows[0]['images']} images" if rows else ""
    )
    return rows
