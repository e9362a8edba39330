import json
import re
import signal
import subprocess
import sys
import time
import warnings
from pathlib import Path

import cv2
import numpy as np
import pytest
import torch
from detectron2.config import get_cfg
from detectron2.data.detection_utils import read_image
from detectron2.engine import DefaultPredictor
from PIL import Image
from pycocotools import mask as mask_util

from codetr_d2 import add_codetr_config
from codetr_d2.visualization import draw_annotations
from codetr_d2_programs import predict as predict_program
from tests.small_disk import small_disk
from tests.tiny_run import write_tiny_run

pytestmark = pytest.mark.slow

THRESHOLD = 0.005


@pytest.fixture(scope="module")
def predict():
    """The main function of ``codetr_d2 predict``."""
    return predict_program.main


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


def error_of(predict, capsys, *arguments) -> str:
    """What the run prints about its end; it ends as train_net.py does at bad input."""
    with pytest.raises(SystemExit) as exit:
        predict([str(x) for x in arguments])
    assert exit.value.code == 2
    return capsys.readouterr().err.splitlines()[-1]


def read_entries(tmp_path) -> list[dict]:
    """The detections of the run, which leaves nothing unfinished behind."""
    assert not list((tmp_path / "out").glob("*unfinished*"))
    return json.loads((tmp_path / "out" / "detections.json").read_text())


def test_folder_with_a_picture_that_cannot_be_read(predict, options, picture, tmp_path, capsys):
    folder = tmp_path / "folder"
    folder.mkdir()
    Image.fromarray(picture).save(folder / "a.png")
    Image.fromarray(picture).convert("CMYK").save(folder / "b.jpg")
    Image.fromarray(picture[..., 0].astype(np.uint16) * 257).save(folder / "c.tif")
    Image.fromarray(picture).save(folder / "a.bmp")
    (folder / "d.png").write_bytes((folder / "a.png").read_bytes()[:1000])
    (folder / "notes.txt").write_text("no picture")
    assert re.search("^error: .*d.png is truncated", error_of(predict, capsys, folder, *options))
    assert [Path(x["file_name"]).name for x in read_entries(tmp_path)] == ["a.bmp", "a.png", "b.jpg", "c.tif"]
    drawn = {x.name for x in (tmp_path / "out").iterdir()}
    assert drawn == {"detections.json", "a.png", "a.png.png", "b.png", "c.png"}


def test_subfolders_and_files_of_other_kinds(predict, options, picture, tmp_path, capsys):
    folder = tmp_path / "folder"
    for name in ("a", "a/b", "a/.hidden"):
        (folder / name).mkdir(parents=True)
        Image.fromarray(picture).save(folder / name / "x.png")
    (folder / "a" / ".DS_Store").write_bytes(bytes(100))
    (folder / "a" / "paper.pdf").write_bytes(b"%PDF-1.4\n" + bytes(range(256)))
    write_video(folder / "a" / "b" / "clip.mp4")
    predict([str(folder), *options])
    printed = capsys.readouterr().out
    assert re.search(r"^Left out, .*: 2, such as .*a/\.DS_Store$", printed, re.M)
    entries = read_entries(tmp_path)
    assert len(entries) == 2 + 3
    assert {x["file_name"] for x in entries} == {str(folder / x) for x in ("a/x.png", "a/b/x.png", "a/b/clip.mp4")}
    drawn = {str(x.relative_to(tmp_path / "out")) for x in (tmp_path / "out").rglob("*.*")}
    assert drawn == {"detections.json", "a/x.png", "a/b/x.png", "a/b/clip.mp4"}


@pytest.mark.parametrize("size", [(6000, 2), (2, 6000), (1, 1)])
def test_thin_pictures(predict, options, tmp_path, size):
    Image.new("RGB", size).save(tmp_path / "x.png")
    predict([str(tmp_path / "x.png"), *options])
    (entry,) = read_entries(tmp_path)
    assert (entry["width"], entry["height"]) == size
    assert max(Image.open(tmp_path / "out" / "x.png").size) == max(640, *size)


def test_pillow_does_not_remark_on_large_pictures(predict, options, picture, tmp_path, monkeypatch):
    monkeypatch.setattr(Image, "MAX_IMAGE_PIXELS", 4000)
    Image.fromarray(picture).save(tmp_path / "x.png")
    with warnings.catch_warnings(record=True) as caught:
        predict([str(tmp_path / "x.png"), *options])
    assert not [x for x in caught if "DecompressionBomb" in x.category.__name__]


def test_a_dollar_sign_in_a_name(predict, picture, tmp_path):
    write_tiny_run(tmp_path, opts=("MODEL.CODETR.CLASS_NAMES", ["$1 bill", "US$ $_", *"23456789"]))
    Image.fromarray(picture).save(tmp_path / "x.png")
    options = [f"--output={tmp_path / 'out'}", f"--config-file={tmp_path / 'config.yaml'}", "--score-threshold=0"]
    predict([str(tmp_path / "x.png"), *options])
    (entry,) = read_entries(tmp_path)
    assert {"$1 bill", "US$ $_"} <= {x["category_name"] for x in entry["detections"]}


def write_video(path: Path, frames: int = 3, size: tuple[int, int] = (96, 64), code: str = "mp4v") -> Path:
    """A video that becomes brighter."""
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*code), 25, size)
    for i in range(frames):
        writer.write(np.full((size[1], size[0], 3), 200 * i // frames, np.uint8))
    writer.release()
    return path


def read_video(path: Path) -> list[np.ndarray]:
    video, frames = cv2.VideoCapture(str(path)), []
    while (frame := video.read())[0]:
        frames.append(frame[1])
    return frames


def test_video(predict, options, tmp_path):
    predict([str(write_video(tmp_path / "x.avi", code="MJPG")), *options])
    assert [x["frame"] for x in read_entries(tmp_path)] == [0, 1, 2]
    frames = read_video(tmp_path / "out" / "x.mp4")
    assert [x.shape for x in frames] == [(64, 96, 3)] * 3
    assert cv2.VideoCapture(str(tmp_path / "out" / "x.mp4")).get(cv2.CAP_PROP_FPS) == pytest.approx(25)
    assert frames[0].mean() < frames[2].mean()


@pytest.mark.parametrize(
    "written, name",
    [("x.ts", "x.TS"), ("x.m2ts", "x.MTS"), ("x.3gp", "x.3gp"), ("x.mp4", "x"), ("x.mpg", "x.mpg"), ("x.mkv", "x.dat")],
)
def test_videos_of_any_name(predict, options, tmp_path, written, name):
    code = {"x.ts": "MPG2", "x.mpg": "PIM1", "x.mkv": "MJPG"}.get(written, "mp4v")
    write_video(tmp_path / written, 5, code=code).rename(tmp_path / name)
    number = len(read_video(tmp_path / name))  # MPEG streams may lack a frame or two of what was written
    predict([str(tmp_path / name), *options])
    assert [x["frame"] for x in read_entries(tmp_path)] == list(range(number)) and number >= 3
    assert len(read_video(tmp_path / "out" / "x.mp4")) == number


def test_video_of_odd_size(predict, options, tmp_path):
    """Encoders take even sizes only: a row and a column are added, and none is lost."""
    frames = [b"FRAME\n" + bytes([60 * i]) * (33 * 17 * 3) for i in range(3)]
    (tmp_path / "x.y4m").write_bytes(b"YUV4MPEG2 W33 H17 F25:1 Ip C444\n" + b"".join(frames))
    predict([str(tmp_path / "x.y4m"), *options])
    assert [(x["width"], x["height"]) for x in read_entries(tmp_path)] == [(33, 17)] * 3
    assert [x.shape for x in read_video(tmp_path / "out" / "x.mp4")] == [(18, 34, 3)] * 3


@pytest.mark.parametrize("name", ["SIGINT", "SIGTERM"])
def test_interrupted(run_folder, tmp_path, name):
    """What is done is written whole, in one line, with the exit code of Ctrl-C."""
    path = write_video(tmp_path / "x.avi", 3000, code="MJPG")
    command = [sys.executable, "-m", "codetr_d2_programs", "predict", str(path), "--output", str(tmp_path / "out")]
    command += ["--config-file", str(run_folder / "config.yaml")]
    process = subprocess.Popen(
        command,
        cwd=Path(__file__).parents[2],
        stderr=subprocess.PIPE,
        text=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.SIG_DFL),  # which a shell's background job ignores
    )
    (unfinished,) = wait_for(lambda: list((tmp_path / "out").glob("detections.json.*.unfinished")))
    wait_for(lambda: unfinished.stat().st_size > 1000)
    assert json.loads(unfinished.read_text())  # whole at any time
    process.send_signal(getattr(signal, name))
    _, errors = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in errors
    number = len(read_entries(tmp_path))
    assert 0 < number < 3000
    assert re.search(r"\ninterrupted: 0 of 1 files done, \d+ detections: .*detections.json\n$", errors)
    assert len(read_video(tmp_path / "out" / "x.mp4")) in (number, number + 1)


def wait_for(condition, seconds: int = 120):
    """What the condition gives once it holds."""
    end = time.monotonic() + seconds
    while not (found := condition()):
        assert time.monotonic() < end
        time.sleep(0.05)
    return found


def test_bad_inputs(predict, options, run_folder, picture, tmp_path, capsys):
    path = tmp_path / "x.png"
    Image.fromarray(picture).save(path)
    text = tmp_path / "x.txt"
    text.write_text("no picture")
    empty = tmp_path / "empty"
    empty.mkdir()
    (empty / "notes.txt").write_text("no picture")
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
        ([path, "--output", text / "below"], "x.txt/below/detections.json cannot be written .*directory"),
        ([path, "--output", "/proc/nowhere"], "/proc/nowhere/detections.json cannot be written"),
        ([path, "--score-threshold", "2"], "--score-threshold is 2.0"),
        ([path, "--config-file", tmp_path / "no.yaml"], "no.yaml: cannot read this config file: it does not exist"),
        ([path, "--config-file", config_alone], "no model_final.pth beside"),
        ([path, "--weights", tmp_path / "no.pth"], "no.pth: no such checkpoint"),
        ([path, "--weights", text], "x.txt: "),
        ([path, "--opts", "MODEL.NONSENSE", "1"], "unknown option MODEL.NONSENSE"),
    ]:
        assert re.search(f"^error: .*{message}", error_of(predict, capsys, *options, *arguments))


def test_the_output_is_tried_before_the_model_is_loaded(predict, options, picture, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr("codetr_d2.inference.predictor.build_model", lambda cfg: pytest.fail("the model is built"))
    Image.fromarray(picture).save(tmp_path / "x.png")
    assert "x.png/below" in error_of(
        predict, capsys, tmp_path / "x.png", *options, "--output", tmp_path / "x.png" / "below"
    )


@pytest.mark.parametrize("name", ["x.png", "x.avi"])
def test_a_full_disk(predict, options, tmp_path, capsys, name):
    """The file that does not fit is named, and what was done before it is written."""
    noise = np.random.default_rng(0).integers(0, 256, (3, 480, 640, 3), dtype=np.uint8)
    Image.new("RGB", (64, 64)).save(tmp_path / "fits.png")
    Image.fromarray(noise[0]).save(tmp_path / "x.png")
    writer = cv2.VideoWriter(str(tmp_path / "x.avi"), cv2.VideoWriter_fourcc(*"MJPG"), 25, (640, 480))
    for frame in noise:
        writer.write(frame)
    writer.release()
    with small_disk(tmp_path / "out", 200) as folder:
        error = error_of(predict, capsys, tmp_path / "fits.png", tmp_path / name, *options, "--score-threshold=1")
        assert re.search(f"^error: .*{Path(name).stem}.(png|mp4) cannot be written", error)
        entries = read_entries(tmp_path)
        assert entries[0]["file_name"] == str(tmp_path / "fits.png")
        assert (folder / "fits.png").exists() and not (folder / "x.png").exists()


def test_the_home_folder(predict, options, run_folder, picture, tmp_path, monkeypatch):
    monkeypatch.setenv("HOME", str(tmp_path))
    monkeypatch.chdir(tmp_path)
    (tmp_path / "run").symlink_to(run_folder)
    Image.fromarray(picture).save(tmp_path / "x.png")
    predict(["~/x.png", "--output=~/out", "--config-file=~/run/config.yaml", "--weights=~/run/model_final.pth"])
    assert len(read_entries(tmp_path)) == 1 and not (tmp_path / "~").exists()


def test_weights_that_are_not_finite(predict, options, run_folder, picture, tmp_path, capsys):
    """One line for all pictures; what an earlier run has found stays."""
    data = torch.load(run_folder / "model_final.pth")
    for value in data["model"].values():
        if value.is_floating_point():
            value.fill_(float("nan"))
    torch.save(data, tmp_path / "nan.pth")
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "detections.json").write_text("[]")
    Image.fromarray(picture).save(tmp_path / "x.png")
    Image.fromarray(picture).save(tmp_path / "y.png")
    files = (tmp_path / "x.png", tmp_path / "y.png")
    assert re.search(
        "^error: .*nan.pth: NaN or infinity in ",
        error_of(predict, capsys, *files, *options, f"--weights={tmp_path / 'nan.pth'}"),
    )
    assert read_entries(tmp_path) == []


def test_default_config_tells_to_run_the_quick_start_first(predict, picture, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    Image.fromarray(picture).save("x.png")
    assert "make quickstart" in error_of(predict, capsys, "x.png", "--output", "out")
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
