import contextlib
import hashlib
import io
import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image
from pycocotools.coco import COCO
from sklearn.datasets import load_digits

SCRIPT = Path(__file__).parents[3] / "tools" / "prepare" / "prepare_digits.py"
SHA256 = "1c2edecf7109c9ba02c3751b2ed6d2d3b6b122954f4e06f4e25fcee07f9d307f"


@pytest.fixture(scope="module")
def dataset(tmp_path_factory):
    folder = tmp_path_factory.mktemp("datasets") / "digits"
    subprocess.run([sys.executable, str(SCRIPT), "--output", str(folder)], check=True)
    return folder


@pytest.fixture
def digits(tool):
    return tool("prepare_digits")


@pytest.fixture
def few(digits, monkeypatch):
    """The script, for a dataset of few pictures."""
    monkeypatch.setattr(digits, "NUM_IMAGES", {"train": 4, "test": 2})
    return digits


@pytest.mark.slow
def test_every_byte_is_as_on_every_other_machine(dataset):
    digest = hashlib.sha256()
    for file in sorted(x for x in dataset.rglob("*") if x.is_file()):
        name = file.relative_to(dataset).as_posix().encode()
        digest.update(name + b"\0" + hashlib.sha256(file.read_bytes()).digest())
    assert digest.hexdigest() == SHA256


@pytest.mark.parametrize("split, count", [("train", 800), ("test", 80)])
def test_pycocotools_reads_it(dataset, split, count):
    with contextlib.redirect_stdout(io.StringIO()):
        coco = COCO(str(dataset / f"{split}.json"))
    assert len(coco.imgs) == count
    assert [x["name"] for x in coco.loadCats(sorted(coco.cats))] == [str(digit) for digit in range(10)]
    assert set(coco.cats) == set(range(1, 11)) == {x["category_id"] for x in coco.anns.values()}
    assert max(len(x) for x in coco.imgToAnns.values()) == 6
    for image in coco.imgs.values():
        with Image.open(dataset / split / image["file_name"]) as file:
            assert (*file.size, file.mode) == (image["width"], image["height"], "RGB")
    for annotation in coco.anns.values():
        x, y, w, h = annotation["bbox"]
        assert x >= 0 and y >= 0 and w >= 2 and h >= 10 and x + w <= 128 and y + h <= 128
        assert annotation["area"] == w * h and annotation["iscrowd"] == 0


def test_training_and_test_digits_are_different_scans(few, tmp_path, monkeypatch):
    used = {}
    monkeypatch.setattr(few, "write_split", lambda folder, split, scans, labels: used.update({split: (scans, labels)}))
    few.prepare(tmp_path / "digits")
    assert len(used["test"][0]) == 360 and len(used["train"][0]) == 1797 - 360
    source = load_digits()

    def as_set(scans, labels):
        return {(scan.astype(np.int64).tobytes(), int(label)) for scan, label in zip(scans, labels)}

    assert as_set(*used["train"]) | as_set(*used["test"]) == as_set(source.images, source.target)
    assert not as_set(*used["train"]) & as_set(*used["test"])


@pytest.mark.parametrize("size", [16, 23, 40, 56])
def test_upscaling_is_bilinear(digits, size):
    scan = load_digits().images[7].astype(np.int64)
    expected = torch.nn.functional.interpolate(torch.tensor(scan)[None, None].double(), (size, size), mode="bilinear")
    actual = digits.upscale(scan, size)
    assert actual.dtype == np.int64
    np.testing.assert_allclose(actual, expected[0, 0] / 16 * 255, atol=1.0)


def test_boxes_hold_their_digit(digits, monkeypatch):
    """On a flat background, a box is where the picture is not background, but for its faintest rim."""
    monkeypatch.setattr(digits, "background", lambda draws: np.zeros((digits.SIZE, digits.SIZE, 3), np.int64))
    draws = digits.Draws(3)
    for scan in load_digits().images[:20].astype(np.int64):
        image, [(_, (x, y, w, h))] = digits.draw_image(draws, [scan])
        inside = image[y : y + h, x : x + w].max(axis=2)
        assert image.sum(dtype=np.int64) == image[y : y + h, x : x + w].sum(dtype=np.int64)
        # the ink reaches each side of the box
        for side in (inside[0], inside[-1], inside[:, 0], inside[:, -1]):
            assert side.max() >= 0.2 * inside.max()


def test_digits_hide_each_other_little(dataset):
    """No box covers more than 15 % of another one, measured by pycocotools."""
    from pycocotools.mask import iou

    data = json.loads((dataset / "train.json").read_text())
    by_image = {}
    for annotation in data["annotations"]:
        by_image.setdefault(annotation["image_id"], []).append(annotation["bbox"])
    shares = []
    for boxes in by_image.values():
        boxes = np.array(boxes, dtype=np.float64)
        covered = iou(boxes, boxes, [1] * len(boxes))  # crowd: intersection / area of the first
        np.fill_diagonal(covered, 0)
        shares.append(covered.max())
    assert 0.05 < max(shares) <= 0.15


def test_png_holds_the_pixels(digits):
    image = np.random.default_rng(0).integers(0, 256, (150, 170, 3), dtype=np.uint8)  # more than one block
    np.testing.assert_array_equal(Image.open(io.BytesIO(digits.png(image))), image)


def test_second_run_writes_nothing_and_an_incomplete_dataset_is_written_anew(few, tmp_path, capsys):
    folder = tmp_path / "digits"
    few.prepare(folder)
    times = {x: x.stat().st_mtime_ns for x in folder.rglob("*")}
    few.prepare(folder)
    assert {x: x.stat().st_mtime_ns for x in folder.rglob("*")} == times
    (folder / "train" / "0002.png").unlink()
    few.prepare(folder)
    assert (folder / "train" / "0002.png").is_file()
    assert [x.name for x in tmp_path.iterdir()] == ["digits"]


def test_other_files_are_left_alone(few, tmp_path):
    (tmp_path / "mine.txt").write_text("mine")
    with pytest.raises(SystemExit, match="holds other files"):
        few.prepare(tmp_path)
    assert [x.name for x in tmp_path.iterdir()] == ["mine.txt"]


def test_interrupted_run_leaves_nothing(few, tmp_path, monkeypatch):
    def interrupted(*args):
        raise KeyboardInterrupt

    monkeypatch.setattr(few, "write_coco", interrupted)
    with pytest.raises(KeyboardInterrupt):
        few.prepare(tmp_path / "digits")
    assert not list(tmp_path.iterdir())
