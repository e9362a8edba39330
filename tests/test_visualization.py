import numpy as np
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from pycocotools import mask as mask_util

from codetr_d2.visualization import draw_annotations, draw_predictions

IMAGE = np.zeros((60, 80, 3), np.uint8)


def predictions(**fields) -> Instances:
    found = Instances((60, 80), pred_boxes=Boxes(torch.tensor([[10.0, 10, 50, 40]])), **fields)
    found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
    return found


def changed(drawing: np.ndarray) -> np.ndarray:
    """[60, 80] bool: pixels that are not black, of a drawing of four times the size."""
    assert drawing.shape == (240, 320, 3)
    return (drawing.max(2) > 20).reshape(60, 4, 80, 4).all((1, 3))


def test_masks_are_drawn_where_there_are_some():
    mask = torch.zeros(1, 60, 80, dtype=torch.bool)
    mask[:, 14:36, 30:46] = True
    inside = mask[0].numpy()
    plain = changed(draw_predictions(IMAGE, predictions(), ["blob"], 320))
    masked = changed(draw_predictions(IMAGE, predictions(pred_masks=mask), ["blob"], 320))
    assert masked[inside].mean() > 0.95 and plain[inside].mean() < 0.3
    new = masked & ~plain
    rows, columns = np.flatnonzero(new.any(1)), np.flatnonzero(new.any(0))
    assert rows[0] >= 13 and rows[-1] <= 36 and columns[0] >= 29 and columns[-1] <= 46


def test_ground_truth_of_both_kinds():
    polygon = [30, 14, 46, 14, 46, 36, 30, 36]
    [rle] = mask_util.frPyObjects([polygon], 60, 80)
    annotation = {"bbox": [10, 10, 40, 30], "bbox_mode": BoxMode.XYWH_ABS, "category_id": 0}
    drawings = [
        draw_annotations(IMAGE, [{**annotation, **mask}], ["blob"], 320)
        for mask in ({"segmentation": [polygon]}, {"segmentation": rle}, {})
    ]
    assert np.array_equal(drawings[0], drawings[1])
    assert changed(drawings[0])[15:35, 31:45].mean() > 0.95 and changed(drawings[2])[15:35, 31:45].mean() < 0.3
