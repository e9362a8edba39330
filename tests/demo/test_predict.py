import importlib.util
import json
from pathlib import Path

import cv2
import numpy as np
import pytest
from detectron2.config import get_cfg
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from PIL import Image
from pycocotools import mask as mask_util

from codetr_d2 import add_codetr_config
from codetr_d2.visualization import draw_annotations
from tests.tiny_run import write_tiny_run

THRESHOLD = 0.005


@pytest.fixture(scope="module")
def predict():
    """The main function of demo/predict.py."""
    spec = importlib.util.spec_from_file_location("predict", Path(__file__).parents[2] / "demo" / "predict.py")
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module.main


@pytest.fixture(scope="module")
def run_folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("run")
    write_tiny_run(folder)
    return folder


@pytest.fixture
def options(run_folder, tmp_path):
    return [
        f"--output={tmp_path / 'out'}",
        f"--config-file={run_folder / 'config.yaml'}",
        f"--score-threshold={THRESHOLD}",
    ]


@pytest.fixture
def picture():
    return np.random.default_rng(0).integers(0, 256, (60, 80, 3), dtype=np.uint8)


def test_finds_what_the_default_predictor_finds(predict, options, run_folder, picture, tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(picture).save(path)
    predict([str(path), *options])
    (entry,) = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert (entry["file_name"], entry["height"], entry["width"]) == (str(path), 60, 80)

    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.merge_from_file(str(run_folder / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(run_folder / "model_final.pth")
    found = DefaultPredictor(cfg)(read_image(str(path), "BGR"))["instances"]
    found = found[found.scores >= THRESHOLD]
    assert 0 < len(found) == len(entry["detections"])
    boxes = found.pred_boxes.tensor.numpy()
    boxes[:, 2:] -= boxes[:, :2]
    np.testing.assert_allclose([x["bbox"] for x in entry["detections"]], boxes, atol=1e-4)
    np.testing.assert_allclose([x["score"] for x in entry["detections"]], found.scores.numpy(), atol=1e-6)
    assert [x["category_id"] for x in entry["detections"]] == found.pred_classes.tolist()
    assert [x["category_name"] for x in entry["detections"]] == [str(c) for c in found.pred_classes.tolist()]
    assert Image.open(tmp_path / "out" / "x.png").size == (640, 480)  # enlarged, so that names can be read


def test_masks(predict, picture, tmp_path):
    """Run-length encoded in detections.json, with the scores of their own, and inside the boxes."""
    write_tiny_run(tmp_path, opts=("MODEL.MASK_ON", True, "MODEL.CODETR.MASK_HEAD", "refine"))
    Image.fromarray(picture).save(tmp_path / "x.png")
    options = [f"--output={tmp_path / 'out'}", f"--config-file={tmp_path / 'config.yaml'}"]
    predict([str(tmp_path / "x.png"), *options, f"--score-threshold={THRESHOLD}"])
    (entry,) = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert entry["detections"]
    for detection in entry["detections"]:
        mask = mask_util.decode(detection["segmentation"])
        assert mask.shape == (60, 80) and 0 < detection["mask_score"] < detection["score"]
        x, y, width, height = detection["bbox"]
        left, top, columns, rows = mask_util.toBbox(detection["segmentation"])
        if mask.any():
            assert left >= x - 1 and top >= y - 1 and left + columns <= x + width + 1 and top + rows <= y + height + 1


def test_folder_with_a_picture_that_cannot_be_read(predict, options, picture, tmp_path):
    folder = tmp_path / "folder"
    folder.mkdir()
    Image.fromarray(picture).save(folder / "a.png")
    Image.fromarray(picture).convert("CMYK").save(folder / "b.jpg")
    Image.fromarray(picture[..., 0].astype(np.uint16) * 257).save(folder / "c.tif")
    Image.fromarray(picture).save(folder / "a.bmp")
    (folder / "d.png").write_bytes((folder / "a.png").read_bytes()[:1000])
    (folder / "notes.txt").write_text("no picture")
    with pytest.raises(SystemExit, match="^error: .*d.png is truncated"):
        predict([str(folder), *options])
    entries = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [Path(x["file_name"]).name for x in entries] == ["a.bmp", "a.png", "b.jpg", "c.tif"]
    drawn = {x.name for x in (tmp_path / "out").iterdir()}
    assert drawn == {"detections.json", "a.png", "a.png.png", "b.png", "c.png"}


def test_video(predict, options, tmp_path):
    path = tmp_path / "x.avi"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 10, (96, 64))
    for i in range(3):
        writer.write(np.full((64, 96, 3), 60 * i, np.uint8))
    writer.release()
    predict([str(path), *options])
    entries = json.loads((tmp_path / "out" / "detections.json").read_text())
    assert [x["frame"] for x in entries] == [0, 1, 2]
    video = cv2.VideoCapture(str(tmp_path / "out" / "x.mp4"))
    frames = []
    while (frame := video.read())[0]:
        frames.append(frame[1])
    assert [x.shape for x in frames] == [(64, 96, 3)] * 3
    assert video.get(cv2.CAP_PROP_FPS) == pytest.approx(10)
    assert frames[0].mean() < frames[2].mean()


def test_bad_inputs(predict, options, run_folder, picture, tmp_path):
    path = tmp_path / "x.png"
    Image.fromarray(picture).save(path)
    text = tmp_path / "x.txt"
    text.write_text("no picture")
    empty = tmp_path / "empty"
    empty.mkdir()
    (tmp_path / "x.mp4").write_text("no video")
    config_alone = tmp_path / "alone" / "config.yaml"
    config_alone.parent.mkdir()
    config_alone.write_text((run_folder / "config.yaml").read_text())
    for arguments, message in [
        ([tmp_path / "nowhere.png"], "nowhere.png does not exist"),
        ([empty], "empty holds no picture"),
        ([text], "x.txt is not an image"),
        ([tmp_path / "x.mp4"], "x.mp4 is not a video"),
        ([path, "--output", tmp_path], "x.png would be overwritten"),
        ([path, "--output", text], "x.txt is a file"),
        ([path, "--score-threshold", "2"], "--score-threshold is 2.0"),
        ([path, "--config-file", tmp_path / "no.yaml"], "no.yaml does not exist"),
        ([path, "--config-file", config_alone], "no model_final.pth beside"),
        ([path, "--weights", tmp_path / "no.pth"], "no.pth: no such checkpoint"),
        ([path, "--weights", text], "x.txt: is a text file"),
        ([path, "--opts", "MODEL.NONSENSE", "1"], "unknown option MODEL.NONSENSE"),
    ]:
        with pytest.raises(SystemExit, match=f"^error: .*{message}") as error:
            predict([str(x) for x in [*options, *arguments]])
        assert "\n" not in str(error.value)


def test_default_config_tells_to_run_the_quick_start_first(predict, picture, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture).save("x.png")
    with pytest.raises(SystemExit, match="make quickstart"):
        predict(["x.png", "--output", "out"])
    assert not (tmp_path / "out").exists()


def test_drawn_boxes_lie_where_they_should():
    """The edges of a drawn box are where its colour is, in the enlarged picture."""
    image = np.full((100, 100, 3), 255, np.uint8)
    annotations = [
        {"bbox": [20, 30, 60, 50], "bbox_mode": 1, "category_id": 0},
        {"bbox": [0, 0, 5, 5], "bbox_mode": 1, "category_id": 0, "iscrowd": 1},
    ]
    drawing = draw_annotations(image, annotations, ["thing"], long_side=400).astype(int)
    assert drawing.shape == (400, 400, 3)
    red = (drawing[..., 0] > 200) & (drawing[..., 1] < 160)
    rows, columns = np.flatnonzero(red.any(1)), np.flatnonzero(red.any(0))
    np.testing.assert_allclose([columns[0], rows[0], columns[-1], rows[-1]], [80, 120, 320, 320], atol=3)
