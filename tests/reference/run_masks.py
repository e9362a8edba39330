"""Runs the mask head on recorded detections and keeps what the recordings of masks hold."""

import numpy as np
import torch
from detectron2.layers import paste_masks_in_image
from detectron2.structures import Boxes, Instances
from torch import Tensor

from codetr_d2.heads import RefineMaskHead
from codetr_d2.structures import FeaturePyramid


@torch.no_grad()
def run_masks(
    head: RefineMaskHead, memory: FeaturePyramid, recorded: dict[str, np.ndarray], meta: dict
) -> dict[str, Tensor]:
    """Full arrays by the names of the recording (its README, section 9), for the one image that it has.

    Args:
        head: with the recorded weights, in eval mode.
        memory: the encoder's output.
        recorded: ``mask_rois`` and ``mask_labels``, and the detections that ``mask_det_indices`` chose.
        meta: of the recording.
    """
    boxes = Boxes(torch.from_numpy(recorded["mask_rois"]))
    labels = torch.from_numpy(recorded["mask_labels"])
    maps = memory.maps()
    logits, ious = head.predict(maps, head.semantic_maps(maps), [boxes], labels)
    values = {f"mask_stage_logits_{i}": x for i, x in enumerate(logits)} | {"mask_iou": ious}

    found = Instances(memory.image_sizes[0], pred_boxes=boxes, pred_classes=labels)
    found.scores = torch.from_numpy(recorded["det_scores_0"][recorded["mask_det_indices"]])
    [found] = head.inference(memory, [found])
    values["mask_score"] = found.mask_scores
    scale = torch.tensor(meta["scale_factors_wh"][0] * 2)
    pasted = paste_masks_in_image(
        found.pred_masks.squeeze(1), Boxes(boxes.tensor / scale), tuple(meta["ori_shape_hw"][0])
    )
    values["masks"] = torch.from_numpy(np.packbits(pasted.flatten(1).numpy(), axis=1))
    return values
