from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
import pytest
from PIL import Image

from codetr_d2.data.tiles import cut_into_tiles, tile_starts


@pytest.mark.parametrize(
    "length, stride, starts", [(100, 50, [0]), (60, 50, [0]), (250, 100, [0, 75, 150]), (200, 50, [0, 50, 100])]
)
def test_tiles_cover_a_side(length, stride, starts):
    assert tile_starts(length, 100, stride) == starts


def dataset(folder, pixels, annotations, name="a.png"):
    """A COCO dict of one picture, [H, W] values."""
    folder.mkdir(parents=True, exist_ok=True)
    Image.fromarray(pixels).convert("RGB").save(folder / name)
    height, width = pixels.shape
    image = {"id": 7, "file_name": str(folder / name), "width": width, "height": height, "split": ""}
    annotations = [{"id": i, "image_id": 7, "category_id": i, "iscrowd": 0, **x} for i, x in enumerate(annotations, 1)]
    return {"images": [image], "annotations": annotations, "categories": [{"id": 1, "name": "x"}]}


@pytest.mark.parametrize("kind", ["box", "polygon", "encoding", "uncompressed"])
def test_objects_are_where_their_pixels_are(kind, tmp_path):
    """Rectangles, each of its own brightness: what a tile says of an object is what can be seen of it there."""
    rng = np.random.default_rng(0)
    pixels, annotations = np.zeros((150, 230), np.uint8), []
    for i, (y, x) in enumerate(((y, x) for y in range(0, 130, 30) for x in range(0, 210, 30)), 1):
        (x0, y0), (w, h) = rng.integers(0, 8, 2) + (x, y), rng.integers(4, 20, 2)
        pixels[y0 : y0 + h, x0 : x0 + w] = i
        annotation = {"bbox": [float(x0), float(y0), float(w), float(h)], "area": float(w * h)}
        if kind == "polygon":
            annotation["segmentation"] = [[float(v) for v in (x0, y0, x0 + w, y0, x0 + w, y0 + h, x0, y0 + h)]]
        elif kind != "box":
            rle = mask_util.encode(np.asfortranarray(pixels == i).view(np.uint8))
            annotation["segmentation"] = rle | {"counts": rle["counts"].decode()}
        if kind == "uncompressed":
            flat = (pixels == i).ravel(order="F")
            edges = np.flatnonzero(np.diff(flat.astype(int))) + 1
            runs = np.diff([0, *edges, len(flat)]).tolist()
            annotation["segmentation"] = {"size": [150, 230], "counts": [0, *runs] if flat[0] else runs}
        annotations.append(annotation)
    coco, splits = cut_into_tiles(dataset(tmp_path / "in", pixels, annotations), ["train"], 64, tmp_path)
    assert splits == ["train"] * len(coco["images"]) and len(coco["images"]) == 4 * 7
    whole = set()
    for tile in coco["images"]:
        seen = np.asarray(Image.open(tile["file_name"]))[..., 0]
        assert seen.shape == (tile["height"], tile["width"]) == (64, 64)
        found = {x["category_id"]: x for x in coco["annotations"] if x["image_id"] == tile["id"]}
        for i, original in enumerate(annotations, 1):
            visible = (seen == i).sum()
            assert (i in found) == (visible > 0 and visible >= 0.5 * original["area"])
            if i not in found:
                continue
            ys, xs = np.nonzero(seen == i)
            expected = [xs.min(), ys.min(), np.ptp(xs) + 1, np.ptp(ys) + 1]
            assert found[i]["bbox"] == pytest.approx(expected) and found[i]["area"] == pytest.approx(visible)
            if kind == "polygon":
                mask = mask_util.decode(mask_util.merge(mask_util.frPyObjects(found[i]["segmentation"], 64, 64)))
                assert (mask == (seen == i)).all()
            elif kind != "box":
                assert (mask_util.decode(found[i]["segmentation"]) == (seen == i)).all()
            if visible == original["area"]:
                whole.add(i)
    assert len(whole) == len(annotations)  # tiles overlap by half, and no object is larger than that
    assert len({x["id"] for x in coco["annotations"]}) == len(coco["annotations"])


def test_a_mask_that_is_cut_in_two(tmp_path):
    """A U, of which the upper half has the two arms: two polygons of one object, and its box around both."""
    u = [[10, 10, 30, 10, 30, 80, 70, 80, 70, 10, 90, 10, 90, 110, 10, 110]]
    annotation = {"bbox": [10, 10, 80, 100], "segmentation": u}
    coco, _ = cut_into_tiles(
        dataset(tmp_path / "in", np.zeros((120, 100), np.uint8), [annotation]), ["val"], 75, tmp_path
    )
    boxes = {Path(coco["images"][x["image_id"] - 1]["file_name"]).stem: x for x in coco["annotations"]}
    assert len(boxes) == 4
    upper = boxes["a_0000_0000"]
    assert len(upper["segmentation"]) == 2 and upper["area"] == 20 * 65 + 5 * 65
    assert upper["bbox"] == [10, 10, 65, 65]


def test_what_is_no_object_in_a_tile(tmp_path):
    """Without area, outside of the picture, or with a mask that is not where its box is; a broken mask is left out."""
    annotations = [
        {"bbox": [10, 10, 0, 5]},
        {"bbox": [-20, -20, 10, 10]},
        {"bbox": [10, 10, 20, 20], "segmentation": [[90, 90, 95, 90, 95, 95]]},
        {"bbox": [5, 5, 20, 20], "segmentation": [[1, 2]]},
    ]
    coco, _ = cut_into_tiles(
        dataset(tmp_path / "in", np.zeros((100, 100), np.uint8), annotations), ["val"], 60, tmp_path
    )
    [left] = coco["annotations"]
    assert left["category_id"] == 4 and left["bbox"] == [5, 5, 20, 20] and "segmentation" not in left


def test_small_pictures_and_other_splits(tmp_path):
    """A picture that is smaller than a tile stays whole; what is evaluated on does not overlap more than it must."""
    coco = dataset(tmp_path / "in", np.arange(30 * 40, dtype=np.uint8).reshape(30, 40), [{"bbox": [1, 2, 3, 4]}])
    found, _ = cut_into_tiles(coco, ["train"], 64, tmp_path / "out")
    [tile] = found["images"]
    assert (tile["width"], tile["height"]) == (40, 30) and found["annotations"][0]["bbox"] == [1, 2, 3, 4]
    assert (np.asarray(Image.open(tile["file_name"])) == np.asarray(Image.open(coco["images"][0]["file_name"]))).all()
    wide = dataset(tmp_path / "in", np.zeros((50, 150), np.uint8), [], "b.png")
    names = [Path(x["file_name"]).stem for x in cut_into_tiles(wide, ["test"], 50, tmp_path / "wide")[0]["images"]]
    assert names == ["b_0000_0000", "b_0050_0000", "b_0100_0000"]
