import tracemalloc

import numpy as np
import pytest
import torch
from detectron2.structures import Boxes, BoxMode, Instances
from matplotlib import font_manager
from PIL import ImageFont
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


def draw_on_white(boxes: list, names: list[str], height: int = 200, width: int = 400, score: float = 0.9) -> np.ndarray:
    """[height, width] bool: pixels as dark as the ground of a label, in a drawing on white."""
    found = Instances((height, width), pred_boxes=Boxes(torch.tensor(boxes, dtype=torch.float32)))
    found.scores, found.pred_classes = torch.full((len(boxes),), score), torch.arange(len(boxes))
    drawing = draw_predictions(np.full((height, width, 3), 255, np.uint8), found, names)
    assert drawing.shape == (height, width, 3)
    return drawing.max(2) < 80


def extent(dark: np.ndarray) -> tuple[int, int]:
    """(height, width) of what is dark."""
    rows, columns = np.flatnonzero(dark.any(1)), np.flatnonzero(dark.any(0))
    return rows[-1] - rows[0] + 1, columns[-1] - columns[0] + 1


@pytest.mark.parametrize(
    "name", ["cat", "$1 bill", "US$ $_", "a_b^{2}", "\\alpha", "\u043a\u043e\u0448\u043a\u0430", "\u00e9\u00df"]
)
def test_names_are_drawn_as_they_are(name):
    """The ground of a label is as wide as its letters, whatever they mean to others."""
    font = ImageFont.truetype(font_manager.findfont("DejaVu Sans"), 12)
    _, width = extent(draw_on_white([[100, 80, 180, 150]], [name]))
    assert font.getlength(f"{name} 90%") <= width <= font.getlength(f"{name} 90%") + 8


@pytest.mark.parametrize(
    "box", [[0, 0, 400, 200], [0, 0, 5, 5], [395, 0, 400, 5], [0, 195, 5, 200], [395, 195, 400, 200]]
)
def test_labels_lie_in_the_picture(box):
    size = extent(draw_on_white([[100, 80, 180, 150]], ["thing"]))
    assert extent(draw_on_white([box], ["thing"])) == size


def test_labels_of_one_place_do_not_hide_each_other():
    area = draw_on_white([[100, 80, 180, 150]], ["thing"]).sum()
    assert draw_on_white([[100, 80, 180, 150]] * 3, ["thing"] * 3).sum() == 3 * area


def test_a_long_name_is_shortened_and_keeps_its_score():
    dark = draw_on_white([[100, 80, 180, 150]], ["word " * 40])
    height, width = extent(dark)
    assert height < 25 and 380 < width <= 400
    other_score = draw_on_white([[100, 80, 180, 150]], ["word " * 40], score=0.88)
    assert np.flatnonzero((dark != other_score).any(0))[0] > 350


def test_odd_names():
    for name in ("", "two\nlines\tand tabs", "\ud83d half of a character", "x" * 5000):
        assert draw_on_white([[100, 80, 180, 150]], [name]).any()


def test_lines_and_letters_grow_with_the_picture():
    (small, _), (large, _) = (
        extent(draw_on_white([[0.2 * h, 0.5 * h, 0.8 * h, 0.9 * h]], ["thing"], h, 2 * h)) for h in (600, 2400)
    )
    assert large == pytest.approx(4 * small, rel=0.15)


@pytest.mark.parametrize("height, width", [(2, 6000), (6000, 2), (1, 1), (5, 5)])
def test_thin_pictures(height, width):
    image = np.zeros((height, width, 3), np.uint8)
    found = Instances((height, width), pred_boxes=Boxes(torch.tensor([[0.0, 0, width, height]])))
    found.scores, found.pred_classes = torch.tensor([0.9]), torch.tensor([0])
    found.pred_masks = torch.ones(1, height, width, dtype=torch.bool)
    for long_side in (0, 640):
        scale = max(1, long_side / max(height, width))
        drawing = draw_predictions(image, found, ["thing"], long_side)
        assert drawing.shape == (round(scale * height), round(scale * width), 3) and drawing.any()


def test_a_mask_lets_the_picture_shine_through():
    """Seven tenths of the picture, three of the colour of the class, and nothing of it outside."""
    image = np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)
    mask = torch.zeros(1, 60, 80, dtype=torch.bool)
    mask[:, 30:39, 20:40] = True  # below the label
    drawing = draw_predictions(image, predictions(pred_masks=mask), [])
    inside = (slice(32, 37), slice(22, 38))
    expected = 0.7 * image[inside][..., ::-1] + 0.3 * np.array([255, 0, 0])
    np.testing.assert_allclose(drawing[inside], expected, atol=0.51)
    assert np.array_equal(drawing[45:, :], image[45:, :, ::-1])


def test_memory_does_not_grow_with_the_number_of_masks():
    side, number = 1500, 30
    image = np.zeros((side, side, 3), np.uint8)
    found = Instances((side, side), pred_boxes=Boxes(torch.tensor([[100.0, 100, side - 100, side - 100]] * number)))
    found.scores, found.pred_classes = torch.full((number,), 0.9), torch.arange(number)
    found.pred_masks = torch.ones(1, side, side, dtype=torch.bool).expand(number, -1, -1)
    tracemalloc.start()
    try:
        draw_predictions(image, found, [])
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert peak < 4 * image.nbytes
