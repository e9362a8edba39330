"""Large pictures cut into tiles, with the objects in them."""

import math
from collections import defaultdict
from collections.abc import Sequence
from pathlib import Path

import numpy as np
import pycocotools.mask as mask_util
from detectron2.data.transforms import CropTransform
from detectron2.structures.masks import polygon_area
from PIL import Image
from tqdm import tqdm

from .annotations import read_mask
from .images import read_image

__all__ = ["cut_into_tiles", "tile_starts"]

_LEAST_VISIBLE = 0.5  # of the area of an object's box, for the object to be in a tile
_TRAINING_STRIDE = 0.5  # of a tile's side; tiles to evaluate on are a whole one apart, as nothing shall count twice


def tile_starts(length: int, size: int, stride: int) -> list[int]:
    """First pixels of evenly spaced tiles, at most ``stride`` apart, that cover ``length`` pixels."""
    steps = math.ceil(max(length - size, 0) / stride)
    return [i * (length - size) // max(1, steps) for i in range(steps + 1)]


def cut_into_tiles(coco: dict, splits: Sequence[str], size: int, folder: Path) -> tuple[dict, list[str]]:
    """Cut pictures into tiles.

    Tiles to train on overlap by half, so that what one of them cuts is whole in another; others by no more than covers
    the picture. An object is in a tile if half of its box is, and its box and mask are cut there. What has no area is
    in none.

    Args:
        coco: of an export, whose pictures can all be read.
        splits: "train", "val" or "test" of each picture.
        size: of a tile's sides in pixels; a smaller side of a picture stays as it is.
        folder: where to write the tiles.

    Returns:
        The same for the tiles, and the split of each.
    """
    objects = defaultdict(list)
    for annotation in coco["annotations"]:
        objects[annotation["image_id"]].append(annotation)
    tiles, tile_splits, annotations = [], [], []
    pictures = tqdm(zip(coco["images"], splits), total=len(splits), desc="Cutting pictures", unit="", disable=None)
    for image, split in pictures:
        pixels = read_image(image["file_name"], "RGB", (image["width"], image["height"]))
        height, width = pixels.shape[:2]
        stride = math.ceil(size * _TRAINING_STRIDE) if split == "train" else size
        place = folder / split / str(image["id"])  # pictures of several folders may have the same name
        place.mkdir(parents=True)
        for top in tile_starts(height, size, stride):
            for left in tile_starts(width, size, stride):
                window = CropTransform(left, top, min(size, width), min(size, height))
                file = place / f"{Path(image['file_name']).stem}_{left:04}_{top:04}.png"
                Image.fromarray(window.apply_image(pixels)).save(file)
                tile = {"id": len(tiles) + 1, "file_name": str(file), "width": window.w, "height": window.h}
                for annotation in objects[image["id"]]:
                    if part := _part(annotation, window, (height, width)):
                        annotations.append(part | {"id": len(annotations) + 1, "image_id": tile["id"]})
                tiles.append(tile | {"split": split})
                tile_splits.append(split)
    return coco | {"images": tiles, "annotations": annotations}, tile_splits


def _part(annotation: dict, window: CropTransform, picture_size: tuple[int, int]) -> dict | None:
    """An object in a window of a picture of (height, width); None where too little of it is there."""
    x, y, width, height = annotation["bbox"]
    x0, x1 = (min(max(edge - window.x0, 0), window.w) for edge in (x, x + width))
    y0, y1 = (min(max(edge - window.y0, 0), window.h) for edge in (y, y + height))
    if x0 >= x1 or y0 >= y1 or (x1 - x0) * (y1 - y0) < _LEAST_VISIBLE * width * height:
        return None
    part = {key: value for key, value in annotation.items() if key != "segmentation"}
    mask = read_mask(annotation.get("segmentation"), picture_size)
    if mask is None:
        return part | {"bbox": [x0, y0, x1 - x0, y1 - y0], "area": (x1 - x0) * (y1 - y0)}
    if isinstance(mask, dict):
        pixels = window.apply_image(mask_util.decode(mask))
        rle = mask_util.encode(np.asfortranarray(pixels))
        box, area = mask_util.toBbox(rle).tolist(), float(pixels.sum())
        segmentation = {"size": rle["size"], "counts": rle["counts"].decode()}
    else:
        polygons = window.apply_polygons([np.array(x, dtype=np.float64).reshape(-1, 2) for x in mask])
        points = np.concatenate([np.zeros((0, 2)), *polygons])
        area = float(sum(polygon_area(*x.T) for x in polygons))
        segmentation = [x.ravel().tolist() for x in polygons]
        box = [*points.min(axis=0), *np.ptp(points, axis=0)] if area else []
    return part | {"bbox": box, "area": area, "segmentation": segmentation} if area else None
