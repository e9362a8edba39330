#!/usr/bin/env python
"""Detect objects with an exported torch program. Copy this file into your own project.

It needs torch, NumPy and Pillow, and of this project nothing but the program and the compiled library of its operators.

    python demo/run_torch_program.py detector.pt2 codetr_d2/_C.so picture.jpg
"""

import argparse
import json
import zipfile

import numpy as np
import torch
from PIL import Image, ImageOps


def load(path: str, library: str):
    """An exported program, or one that was compiled ahead of time -> the function, and what it says of itself."""
    torch.ops.load_library(library)
    with zipfile.ZipFile(path) as archive:
        compiled = any("/data/aotinductor/" in name for name in archive.namelist())
    if compiled:
        program = torch._inductor.aoti_load_package(path)
        return program, json.loads(program.get_metadata()["codetr_d2.json"])
    extra = {"codetr_d2.json": ""}
    program = torch.export.load(path, extra_files=extra)
    return program.module(), json.loads(extra["codetr_d2.json"])


def resized(picture: Image.Image, about: dict) -> Image.Image:
    """The shorter side has min_size pixels, but the longer one at most max_size, as in the model's tests."""
    scale = min(about["min_size"] / min(picture.size), about["max_size"] / max(picture.size))
    return picture.resize([int(side * scale + 0.5) for side in picture.size], Image.Resampling.BILINEAR)


def padded(pixels: np.ndarray, about: dict) -> np.ndarray:
    """[height, width, 3] at the top left of a size that the program takes; it does not look at the padding."""
    unit, smallest = about["multiple_of"], about["smallest"]
    size = about["size"] or [max(-(-side // unit) * unit, smallest) for side in pixels.shape[:2]]
    return np.pad(pixels, [*((0, whole - side) for whole, side in zip(size, pixels.shape)), (0, 0)])


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("program", help="the .pt2 file")
    parser.add_argument("library", help="the compiled library of the operators, _C.so")
    parser.add_argument("picture")
    parser.add_argument("--threshold", type=float, default=0.5, help="lowest score")
    args = parser.parse_args()

    program, about = load(args.program, args.library)
    picture = ImageOps.exif_transpose(Image.open(args.picture)).convert("RGB")
    pixels = np.asarray(resized(picture, about))
    images = torch.from_numpy(padded(pixels, about)).permute(2, 0, 1)[None].contiguous()
    with torch.no_grad():
        boxes, scores, classes = (x[0] for x in program(images, torch.tensor([pixels.shape[:2]])))
    boxes = boxes * (picture.width / pixels.shape[1])
    for box, score, label in zip(boxes.tolist(), scores.tolist(), classes.tolist()):
        if score >= args.threshold and box[0] < box[2] and box[1] < box[3]:
            print(about["class_names"][label], f"{score:.3f}", *(f"{x:.1f}" for x in box))


if __name__ == "__main__":
    main()
