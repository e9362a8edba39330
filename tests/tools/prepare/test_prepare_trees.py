"""Tiling, on a small wheel of the same layout as the real one; nothing is downloaded."""

import contextlib
import hashlib
import io
import zipfile

import numpy as np
import pytest
from PIL import Image
from pycocotools.coco import COCO

SIZES = {  # width, height
    "2019_YELL_2_528000_4978000_image_crop2": (600, 430),
    "OSBS_029": (400, 400),
    "SOAP_061": (256, 300),
    "2019_YELL_2_541000_4977000_image_crop": (700, 520),
}
OBJECT = "<object><name>{}</name><bndbox><xmin>{}</xmin><ymin>{}</ymin><xmax>{}</xmax><ymax>{}</ymax></bndbox></object>"


def crowns(size: tuple[int, int]) -> np.ndarray:
    """[N, 4] xyxy boxes that do not touch each other."""
    rng = np.random.default_rng(0)
    boxes = []
    for x in range(0, size[0] - 60, 60):
        for y in range(0, size[1] - 60, 60):
            (x0, y0), (x1, y1) = rng.integers(0, 20, 2), rng.integers(30, 58, 2)
            boxes.append([x + x0, y + y0, x + x1, y + y1])
    return np.array(boxes)


@pytest.fixture
def trees(tool, monkeypatch, tmp_path):
    """(the script, a wheel for it): photographs that are black, but for each crown's pixels, which hold its number."""
    script = tool("prepare_trees")
    wheel = tmp_path / "trees.whl"
    with zipfile.ZipFile(wheel, "w") as archive:
        for name, size in SIZES.items():
            pixels = np.zeros((size[1], size[0], 3), np.uint8)
            for i, (x0, y0, x1, y1) in enumerate(crowns(size), 1):
                pixels[y0:y1, x0:x1] = i
            file = io.BytesIO()
            Image.fromarray(pixels).save(file, "png")
            archive.writestr(f"deepforest/data/{name}.png", file.getvalue())
            objects = [OBJECT.format(["Tree", "Dead", "Alive"][i % 3], *box) for i, box in enumerate(crowns(size))]
            archive.writestr(f"deepforest/data/{name}.xml", f"<annotation>{''.join(objects)}</annotation>")
    monkeypatch.setattr(script, "SHA256", hashlib.sha256(wheel.read_bytes()).hexdigest())
    return script, wheel


def test_boxes_are_where_the_crowns_are(trees, tmp_path):
    script, wheel = trees
    folder = tmp_path / "trees"
    script.prepare(folder, wheel)
    areas = {name: np.prod(crowns(size)[:, 2:] - crowns(size)[:, :2], axis=1) for name, size in SIZES.items()}
    for split, names in script.PHOTOGRAPHS.items():
        with contextlib.redirect_stdout(io.StringIO()):
            coco = COCO(str(folder / f"{split}.json"))
        assert [x["name"] for x in coco.cats.values()] == ["tree"]
        seen = {name: set() for name in names}
        for image in coco.imgs.values():
            name, left, top = image["file_name"].removesuffix(".png").rsplit("_", 2)
            pixels = np.asarray(Image.open(folder / split / image["file_name"]))[..., 0]
            assert pixels.shape == (256, 256) == (image["height"], image["width"])
            expected = set()
            for i in np.unique(pixels[pixels > 0]).tolist():
                visible = pixels == i
                if visible.sum() >= 0.5 * areas[name][i - 1]:
                    rows, columns = np.flatnonzero(visible.any(1)), np.flatnonzero(visible.any(0))
                    expected.add((columns[0], rows[0], len(columns), len(rows)))
                    seen[name].add(i)
            assert {tuple(x["bbox"]) for x in coco.imgToAnns[image["id"]]} == expected
        for name in names:
            assert len(seen[name]) == len(areas[name])  # no crown is lost


@pytest.mark.parametrize("length", [256, 257, 400, 1035, 2472])
@pytest.mark.parametrize("stride", [128, 256])
def test_tiles_cover_a_photograph(tool, length, stride):
    starts = tool("prepare_trees").tile_starts(length, stride)
    assert starts[0] == 0 and starts[-1] == length - 256
    assert all(0 < b - a <= stride for a, b in zip(starts, starts[1:]))


def test_second_run_needs_no_wheel(trees, tmp_path, capsys):
    script, wheel = trees
    script.prepare(tmp_path / "trees", wheel)
    wheel.unlink()
    script.prepare(tmp_path / "trees")
    assert "there already" in capsys.readouterr().out


def test_damaged_or_absent_wheel(trees, tmp_path):
    script, wheel = trees
    with open(wheel, "ab") as file:
        file.write(b"x")
    with pytest.raises(SystemExit, match="trees.whl has sha256"):
        script.prepare(tmp_path / "trees", wheel)
    with pytest.raises(SystemExit, match="absent.whl is not a file"):
        script.prepare(tmp_path / "trees", tmp_path / "absent.whl")
    assert not (tmp_path / "trees").exists() and not list(tmp_path.glob(".trees*"))


def test_no_network(trees, tmp_path, monkeypatch):
    script, _ = trees
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    with pytest.raises(SystemExit, match="could not download deepforest==2.1.0.*--wheel"):
        script.prepare(tmp_path / "trees")
    assert not (tmp_path / "trees").exists()
