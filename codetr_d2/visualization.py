"""Pictures with boxes and masks on them, legible for small images too."""

import colorsys
from collections.abc import Sequence

import cv2
import numpy as np
from detectron2.structures import BoxMode, Instances
from detectron2.utils.visualizer import GenericMask, Visualizer

__all__ = ["draw_annotations", "draw_predictions"]


def draw_predictions(
    image: np.ndarray, predictions: Instances, class_names: Sequence[str], long_side: int = 0
) -> np.ndarray:
    """Draw detections with class names and scores.

    Args:
        image: [H, W, 3] uint8, BGR.
        predictions: on the CPU, with ``pred_boxes`` (xyxy, pixels of ``image``), ``scores`` and ``pred_classes``, and
            where there are masks ``pred_masks`` ([N, H, W] bool).
        class_names: names by class index; may be empty.
        long_side: smaller images are enlarged to this many pixels.

    Returns:
        [H', W', 3] uint8, RGB.
    """
    classes = predictions.pred_classes.tolist()
    labels = [f"{_name(c, class_names)} {s:.0%}" for c, s in zip(classes, predictions.scores.tolist())]
    masks = list(predictions.pred_masks.numpy()) if predictions.has("pred_masks") else None
    return _draw(image, predictions.pred_boxes.tensor.numpy(), masks, classes, labels, long_side)


def draw_annotations(
    image: np.ndarray, annotations: list[dict], class_names: Sequence[str], long_side: int = 0
) -> np.ndarray:
    """Draw the ``annotations`` of a detectron2 dataset dict, but for crowds; otherwise as :func:`draw_predictions`."""
    annotations = [x for x in annotations if x.get("iscrowd", 0) == 0]
    boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in annotations]
    classes = [x["category_id"] for x in annotations]
    labels = [_name(c, class_names) for c in classes]
    masks = None
    if all("segmentation" in x for x in annotations):
        masks = [GenericMask(x["segmentation"], *image.shape[:2]).mask for x in annotations]
    return _draw(image, np.array(boxes, dtype=np.float64).reshape(-1, 4), masks, classes, labels, long_side)


def _name(category: int, class_names: Sequence[str]) -> str:
    return class_names[category] if category < len(class_names) else str(category)


def _draw(
    image: np.ndarray,
    boxes_xyxy: np.ndarray,
    masks: list[np.ndarray] | None,
    classes: list[int],
    labels: list[str],
    long_side: int,
) -> np.ndarray:
    # The image is enlarged here: the Visualizer's own scale leaves the letters as small as they were.
    scale = max(1.0, long_side / max(image.shape[:2]))
    if scale > 1:
        image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    # Bright colours, the same for a class in every picture; steps of the golden ratio keep them apart.
    colours = [colorsys.hsv_to_rgb(c * 0.618 % 1, 1, 1) for c in classes]
    visualizer = Visualizer(image[:, :, ::-1])
    if masks is not None:
        height, width = image.shape[:2]
        masks = [cv2.resize(x.astype(np.uint8), (width, height), interpolation=cv2.INTER_NEAREST) for x in masks]
    # The opacity is that of the masks.
    visualizer.overlay_instances(
        boxes=boxes_xyxy * scale, masks=masks, labels=labels, assigned_colors=colours, alpha=0.3
    )
    return visualizer.output.get_image()
