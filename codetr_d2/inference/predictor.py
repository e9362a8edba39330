"""A trained or published model as one call: picture in, detections out."""

from typing import Any

import numpy as np
from detectron2.config import CfgNode
from detectron2.data import MetadataCatalog
from detectron2.data.detection_utils import convert_PIL_to_numpy
from detectron2.engine import DefaultPredictor
from detectron2.modeling import build_model
from PIL import Image
from torch import nn

from ..checkpoint.checkpointer import CoDETRCheckpointer
from ..data.transforms import ResizeShortestEdge
from ..errors import InputError
from .exported import ExportedDetector, is_exported

__all__ = ["Predictor"]


class Predictor(DefaultPredictor):
    """detectron2's ``DefaultPredictor`` for any weights, any size of picture, and any ``INPUT.FORMAT``.

    ``MODEL.WEIGHTS`` may be a published Co-DETR file as it was downloaded, or whatever else
    :class:`CoDETRCheckpointer` reads. A file that tools/export.py wrote (``.onnx``, or ``.xml`` of OpenVINO) is
    run by its own runtime, on the CPU.

    Args:
        cfg: the model's config.

    Attributes:
        cfg, model, metadata, aug, input_format: those of the base class.

    Raises:
        InputError: the weights are missing, damaged, or of another model.
    """

    def __init__(self, cfg: CfgNode):
        # Not the base class's, which loads with detectron2's checkpointer and refuses formats other than RGB and BGR.
        self.cfg = cfg.clone()  # the model may change it
        self.model = self._build_model()
        if len(cfg.DATASETS.TEST):
            self.metadata = MetadataCatalog.get(cfg.DATASETS.TEST[0])
        self.aug = ResizeShortestEdge([cfg.INPUT.MIN_SIZE_TEST] * 2, cfg.INPUT.MAX_SIZE_TEST)
        self.input_format = cfg.INPUT.FORMAT

    def _build_model(self) -> nn.Module:
        weights = self.cfg.MODEL.WEIGHTS
        if is_exported(weights):
            return ExportedDetector(weights, self.cfg.INPUT.FORMAT)
        model = build_model(self.cfg).eval()
        CoDETRCheckpointer(model).load(weights)
        return model

    def __call__(self, original_image: np.ndarray) -> dict:
        """Detect.

        Args:
            original_image: [H, W, 3] uint8, BGR as ``cv2.imread`` and ``read_image(file, "BGR")`` give it, whatever the
                model's ``INPUT.FORMAT``; where that is "L" also [H, W] or [H, W, 1].

        Returns:
            What the model gives for one picture: ``{"instances": Instances}`` in pixels of it.

        Raises:
            InputError: the array is of another kind, or the model computes no finite numbers.
        """
        image = self._in_input_format(original_image)
        try:
            return super().__call__(image)
        except FloatingPointError as error:
            raise InputError(
                f"{self.cfg.MODEL.WEIGHTS}: {error}. Use other weights, for instance an earlier checkpoint of the run"
            ) from error

    def _in_input_format(self, image: np.ndarray) -> np.ndarray:
        """BGR -> ``INPUT.FORMAT``, but for RGB, for which the base class turns the channels around."""
        _check(image, self.input_format == "L")
        if image.ndim == 2 or image.shape[2] == 1:
            return image.reshape(*image.shape[:2], 1)
        if self.input_format in ("RGB", "BGR"):
            return image
        return convert_PIL_to_numpy(Image.fromarray(np.ascontiguousarray(image[:, :, ::-1])), self.input_format)


def _check(image: Any, may_be_grey: bool) -> None:
    """Raise an InputError that says what ``image`` is, and how to make a picture of it that a model takes."""
    what, shape = f"a {type(image).__name__}", []
    if isinstance(image, np.ndarray):
        what, shape = f"an array {list(image.shape)} of {image.dtype}", image.shape
    channels = shape[2] if len(shape) == 3 else int(len(shape) == 2)
    if image is None:
        what, mend = "None", "that is what cv2.imread gives for a file that it cannot read: check the path"
    elif not isinstance(image, np.ndarray):
        mend = 'read a file with cv2.imread(file) or codetr_d2.data.read_image(file, "BGR")'
    elif channels == 4:
        mend = "convert it with cv2.cvtColor(image, cv2.COLOR_BGRA2BGR), RGBA with cv2.COLOR_RGBA2BGR"
    elif channels not in (1, 3):
        is_first = len(shape) == 3 and shape[0] in (1, 3, 4)
        mend = "move the channels last with image.transpose(1, 2, 0)" if is_first else "give one picture at a time"
    elif image.dtype != np.uint8:
        mend = "convert it with .round().astype(numpy.uint8); values from 0 to 1 must be multiplied by 255 before"
    elif image.size == 0:
        mend = "it holds no pixel"
    elif channels == 1 and not may_be_grey:
        mend = "convert it with cv2.cvtColor(image, cv2.COLOR_GRAY2BGR)"
    else:
        return
    grey = ", or [H, W] in grey" if may_be_grey else ""
    raise InputError(f"the picture is {what}, but a numpy array [H, W, 3] of uint8 is expected, BGR{grey}; {mend}")
