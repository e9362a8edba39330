"""Pictures with boxes and masks on them, legible for small and large images."""

import colorsys
import math
from collections.abc import Callable, Sequence

import cv2
import numpy as np
from detectron2.structures import BoxMode, Instances
from PIL import Image, ImageDraw
from pycocotools import mask as mask_util

from .fonts import load_font

__all__ = ["draw_annotations", "draw_predictions"]

_MASK_OPACITY = 0.3
_LABEL_OPACITY = 0.75  # of what lies behind the letters

# The mask of the object with an index: [h, w] bool or uint8, and its left and top pixel in the image.
_MaskOf = Callable[[int], tuple[np.ndarray, int, int]]


def draw_predictions(
    image: np.ndarray, predictions: Instances, class_names: Sequence[str], long_side: int = 0
) -> np.ndarray:
    """Draw detections with class names and scores.

    Lines and letters grow with the picture. Memory for one more picture is needed, however many masks there are.

    Args:
        image: [H, W, 3] uint8, BGR.
        predictions: on the CPU, with ``pred_boxes`` (xyxy, pixels of ``image``), ``scores`` and ``pred_classes``, and
            where there are masks ``pred_masks`` ([N, H, W] bool, each drawn inside its box).
        class_names: names by class index; may be empty.
        long_side: smaller images are enlarged to this many pixels.

    Returns:
        [H', W', 3] uint8, RGB.
    """
    classes, boxes = predictions.pred_classes.tolist(), predictions.pred_boxes.tensor.numpy()
    labels = [(_name(c, class_names), f" {s:.0%}") for c, s in zip(classes, predictions.scores.tolist())]

    def mask_of(i: int) -> tuple[np.ndarray, int, int]:
        left, top = np.floor(boxes[i, :2]).clip(0).astype(int)
        right, bottom = np.ceil(boxes[i, 2:]).astype(int)
        return predictions.pred_masks[i, top:bottom, left:right].numpy(), left, top

    return _draw(image, boxes, mask_of if predictions.has("pred_masks") else None, classes, labels, long_side)


def draw_annotations(
    image: np.ndarray, annotations: list[dict], class_names: Sequence[str], long_side: int = 0
) -> np.ndarray:
    """Draw the ``annotations`` of a detectron2 dataset dict, but for crowds; otherwise as :func:`draw_predictions`."""
    annotations = [x for x in annotations if x.get("iscrowd", 0) == 0]
    boxes = [BoxMode.convert(x["bbox"], x["bbox_mode"], BoxMode.XYXY_ABS) for x in annotations]
    classes = [x["category_id"] for x in annotations]
    labels = [(_name(c, class_names), "") for c in classes]

    def mask_of(i: int) -> tuple[np.ndarray, int, int]:
        mask = annotations[i]["segmentation"]
        if isinstance(mask, list):
            mask = mask_util.merge(mask_util.frPyObjects(mask, *image.shape[:2]))
        elif isinstance(mask["counts"], list):
            mask = mask_util.frPyObjects(mask, *image.shape[:2])
        left, top, width, height = mask_util.toBbox(mask).astype(int)
        return mask_util.decode(mask)[top : top + height, left : left + width], left, top

    has_masks = all("segmentation" in x for x in annotations)
    boxes = np.array(boxes, dtype=np.float64).reshape(-1, 4)
    return _draw(image, boxes, mask_of if has_masks else None, classes, labels, long_side)


def _name(category: int, class_names: Sequence[str]) -> str:
    return class_names[category] if category < len(class_names) else str(category)


def _draw(
    image: np.ndarray,
    boxes_xyxy: np.ndarray,
    mask_of: _MaskOf | None,
    classes: list[int],
    labels: list[tuple[str, str]],
    long_side: int,
) -> np.ndarray:
    """Draw objects; a label is a name, which is shortened where it is too long, and what comes after it."""
    scale = max(1.0, long_side / max(image.shape[:2]))
    canvas = cv2.cvtColor(image, cv2.COLOR_BGR2RGB)
    if scale > 1:
        canvas = cv2.resize(canvas, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    height, width = canvas.shape[:2]
    side = math.sqrt(height * width)  # what lines and letters grow with
    thickness = max(2, round(side / 400))
    corners = np.rint(boxes_xyxy * scale).clip(0, (width - 1, height - 1) * 2).astype(int).reshape(-1, 4)
    # Bright colours, the same for a class in every picture; steps of the golden ratio keep them apart.
    colours = [tuple(round(255 * x) for x in colorsys.hsv_to_rgb(c * 0.618 % 1, 1, 1)) for c in classes]

    areas = (corners[:, 2:] - corners[:, :2]).prod(1)
    largest_first = np.argsort(-areas, kind="stable").tolist()
    for i in largest_first if mask_of else ():
        _draw_mask(canvas, *mask_of(i), scale, colours[i], max(1, thickness // 2))
    for i in largest_first:
        # The whole line lies in the picture, also that of a box as large as it.
        margin = thickness // 2
        left, top, right, bottom = corners[i].clip(margin, None).tolist()
        right, bottom = min(right, width - 1 - margin), min(bottom, height - 1 - margin)
        cv2.rectangle(canvas, (left, top), (right, bottom), colours[i], thickness)
    places = _Places(width, height)
    for box, (name, rest), colour in zip(corners.tolist(), labels, colours):
        letters = _render(name, rest, max(12, round(side / 60)), width)
        if letters.shape[0] <= height and letters.shape[1] <= width:
            left, top = places.take(box, letters.shape)
            _draw_label(canvas[top : top + letters.shape[0], left : left + letters.shape[1]], letters, colour)
    return canvas


def _draw_mask(
    canvas: np.ndarray,
    mask: np.ndarray,
    left: int,
    top: int,
    scale: float,
    colour: tuple[int, int, int],
    thickness: int,
) -> None:
    """Colour a mask, and draw its outline."""
    if not mask.size:
        return
    mask = mask.astype(np.uint8)
    (y0, x0), (y1, x1) = [
        (round(y * scale), round(x * scale)) for y, x in ((top, left), np.add((top, left), mask.shape))
    ]
    if scale > 1:
        mask = (cv2.resize(mask * 255, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR) > 127).astype(np.uint8)
    region = canvas[y0:y1, x0:x1]
    mixed = np.arange(256)[:, None] * (1 - _MASK_OPACITY) + np.array(colour) * _MASK_OPACITY
    coloured = cv2.LUT(region, mixed.round().astype(np.uint8)[None])
    cv2.copyTo(coloured, mask, region)
    outlines, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(canvas, outlines, -1, colour, thickness, cv2.LINE_AA, offset=(x0, y0))


def _render(name: str, rest: str, size: int, max_width: int) -> np.ndarray:
    """A label as [h, w] uint8, 255 where letters are, with a margin. Long names are shortened to ``max_width``."""
    # Lone halves of a character, which a json file may hold, are no text.
    name = " ".join(name.encode("utf-8", "replace").decode().split())
    font, margin = load_font(name, size), max(2, size // 5)
    text = (name + rest).strip()
    for length in range(min(len(name), max_width) - 1, -1, -1):
        if font.getlength(text) + 2 * margin <= max_width:
            break
        text = f"{name[:length]}…{rest}"
    left, _, right, _ = map(math.ceil, font.getbbox(text))
    ascent, descent = font.getmetrics()
    picture = Image.new("L", (right - min(left, 0) + 2 * margin, ascent + descent + margin))
    ImageDraw.Draw(picture).text((margin - min(left, 0), margin // 2), text, fill=255, font=font)
    return np.asarray(picture)


def _draw_label(region: np.ndarray, letters: np.ndarray, colour: tuple[int, int, int]) -> None:
    """Draw letters in a light shade of a colour on a dark ground."""
    share = letters[..., None] / 255
    light = 255 - (255 - np.array(colour)) * 0.2
    region[:] = (region * (1 - _LABEL_OPACITY) * (1 - share) + light * share).round()


class _Places:
    """Where labels lie in a picture, chosen one after the other so that they hide each other little."""

    def __init__(self, width: int, height: int):
        self.width, self.height = width, height
        self.taken = np.empty((0, 4), int)  # xyxy

    def take(self, box: Sequence[int], shape: tuple[int, int]) -> tuple[int, int]:
        """Left and top of a label of a shape (height, width) for a box xyxy."""
        (h, w), (x0, y0, x1, y1) = shape, box
        places = [(x0, y0 - h), (x0, y0), (x0, y1), (x1 - w, y0 - h), (x1 - w, y1), (x1, y0)]
        places = [(x, y) for x, y in places if 0 <= y <= self.height - h] or [(x0, 0)]
        places = [(min(max(x, 0), self.width - w), y) for x, y in places]
        hidden = []
        for x, y in places:
            overlap = np.minimum(self.taken[:, 2:], (x + w, y + h)) - np.maximum(self.taken[:, :2], (x, y))
            hidden.append(overlap.clip(0).prod(1).sum())
        x, y = places[int(np.argmin(hidden))]
        self.taken = np.concatenate((self.taken, [[x, y, x + w, y + h]]))
        return x, y
