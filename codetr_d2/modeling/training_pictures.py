"""Pictures of what a model predicts while it trains, for TensorBoard (``VIS_PERIOD``)."""

from collections.abc import Sequence

import numpy as np
import torch
from detectron2.data.detection_utils import convert_image_to_rgb
from detectron2.structures import BoxMode
from detectron2.utils import comm
from detectron2.utils.events import get_event_storage
from torch import Tensor

from .postprocess import detections_from_queries

__all__ = ["TrainingPictures"]

_LONG_SIDE = 512  # pixels that smaller images are enlarged to, so that their labels can be read
_GAP = 8  # pixels between the halves


class TrainingPictures:
    """Puts a picture into detectron2's event storage every ``period`` iterations: ground truth and predictions.

    It shows the first image of the batch as training sees it: on the left its objects, on the right as many of the best
    predictions as there are objects, at least one. In the main process alone, whose storage is written. What is drawn
    has been computed for the training anyway; nothing random is drawn and no weight is touched.

    Args:
        period: iterations.
        input_format: of the images, as ``INPUT.FORMAT``.
        class_names: names by class index; may be empty.
    """

    NAME = "ground_truth_left_predictions_right"

    def __init__(self, period: int, input_format: str, class_names: Sequence[str]):
        self.period = period
        self.input_format = input_format
        self.class_names = class_names
        self._last_iteration = -1

    @torch.no_grad()
    def put(
        self, batched_inputs: list[dict], logits: Tensor, boxes: Tensor, image_sizes: list[tuple[int, int]]
    ) -> None:
        """
        Args:
            batched_inputs: with ``image`` ([C, H, W], levels from 0 to 255) and ``instances``: ``gt_boxes`` (xyxy in
                pixels of ``image``) and ``gt_classes``.
            logits: [B, Q, K] class logits of the matching queries.
            boxes: [B, Q, 4] cxcywh normalised by the image size.
            image_sizes: (height, width) of each image in pixels of the network input.
        """
        iteration = get_event_storage().iter
        # Further micro-batches of an iteration add nothing.
        if not comm.is_main_process() or iteration % self.period or iteration == self._last_iteration:
            return
        logits, boxes = logits[:1].float().cpu(), boxes[:1].float().cpu()
        if not (logits.isfinite().all() and boxes.isfinite().all()):
            return  # the loss isn't either, which ends the training with a message of its own
        # Here, as it brings along matplotlib, which takes long to import.
        from ..visualization import draw_annotations, draw_predictions

        self._last_iteration = iteration
        truth = batched_inputs[0]["instances"].to("cpu")
        pixels = batched_inputs[0]["image"].permute(1, 2, 0).cpu().numpy()
        rgb = convert_image_to_rgb(pixels, self.input_format).clip(0, 255).astype(np.uint8)
        image = np.ascontiguousarray(rgb[:, :, ::-1])  # BGR
        annotations = [
            {"bbox": box, "bbox_mode": BoxMode.XYXY_ABS, "category_id": label}
            for box, label in zip(truth.gt_boxes.tensor.tolist(), truth.gt_classes.tolist())
        ]
        (predictions,) = detections_from_queries(logits, boxes, image_sizes[:1], max(1, len(truth)))
        left = draw_annotations(image, annotations, self.class_names, _LONG_SIDE)
        right = draw_predictions(image, predictions, self.class_names, _LONG_SIDE)
        gap = np.full((len(left), _GAP, 3), 255, np.uint8)
        picture = np.concatenate((left, gap, right), axis=1)
        get_event_storage().put_image(self.NAME, picture.transpose(2, 0, 1))
