"""Runs the mask head on recorded detections and keeps what the recordings of masks hold."""

import torch
from detectron2.layers import paste_masks_in_image
from detectron2.structures import Boxes, Instances
from torch import Tensor


@torch.no_grad()
def run_masks(model: torch.nn.Module, batch: list[dict], recorded: dict[str, Tensor], meta: dict) -> dict[str, Tensor]:
    """Full arrays by the names of the recording (its README, section 9), for the one image that it has.

    ``masks`` is not packed: [detections, height, width] bool.
    """
    model.eval()
    memory = model.query_head.encode(model.features(model.preprocess(batch)))
    boxes, labels = Boxes(recorded["mask_rois"]), recorded["mask_labels"]
    maps = memory.maps()
    logits, ious = model.mask_head.predict(maps, model.mask_head.semantic_maps(maps), [boxes], labels)
    values = {f"mask_stage_logits_{i}": x for i, x in enumerate(logits)} | {"mask_iou": ious}

    found = Instances(memory.geometry.image_sizes[0], pred_boxes=boxes, pred_classes=labels)
    found.scores = recorded["det_scores_0"][recorded["mask_det_indices"]]
    [found] = model.mask_head.inference(memory, [found])
    values["mask_score"] = found.mask_scores
    # As detectron2 pastes them, but by the recorded scale, which is not exactly that of the sizes.
    original = Boxes(boxes.tensor / torch.tensor(meta["scale_factors_wh"][0] * 2))
    values["masks"] = paste_masks_in_image(found.pred_masks.squeeze(1), original, tuple(meta["ori_shape_hw"][0]))
    return values
