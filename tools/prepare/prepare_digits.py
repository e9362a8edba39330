#!/usr/bin/env python
"""Write the digits dataset: handwritten digits scattered over small colour pictures, as COCO json and images.

The digits are scikit-learn's ``load_digits`` (1797 scans of 8 x 8 pixels, UCI ML hand-written digits). Training and
test pictures use different scans. The files are the same, byte for byte, on every machine: only whole numbers are
computed with, random numbers are raw ones of PCG64 (whose stream NumPy guarantees, unlike that of its distributions),
and the PNG files are written here without compression (compressors differ between builds of zlib).

    python tools/prepare/prepare_digits.py [--output datasets/digits]
"""

import argparse
import struct
import zlib
from pathlib import Path

import numpy as np
from prepare_common import is_complete, whole_folder, write_coco
from sklearn.datasets import load_digits

RECIPE = "digits 1"  # raise it when the files change: older ones are then replaced
SIZE = 128  # pixels, side of a picture
NUM_IMAGES = {"train": 800, "test": 80}
NUM_TEST_DIGITS = 360
SEED = {"split": 0, "train": 1, "test": 2}
DIGIT_SIZE = (16, 56)  # side of a scan on the picture, before its empty margin is cut off
NUM_DIGITS = (1, 6)  # in a picture
MAX_COVERED = 15  # percent of a box that another one may cover
MIN_CONTRAST = 80  # difference of brightness between a digit and what is behind it, of 255
INK = 64  # opacity, of 255, from which a pixel belongs to the digit's box


class Draws:
    """Random whole numbers, the same for every version of NumPy."""

    def __init__(self, seed: int):
        self.bits = np.random.PCG64(seed)

    def integers(self, low: int, high: int, size: int | None = None):
        """Whole number(s) from ``low`` to ``high``, both included."""
        raw = self.bits.random_raw(size) % (high - low + 1)
        return int(raw) + low if size is None else raw.astype(np.int64) + low

    def shuffled(self, count: int) -> np.ndarray:
        """The numbers below ``count`` in random order."""
        return np.argsort(self.bits.random_raw(count), kind="stable")


def upscale(digit: np.ndarray, size: int) -> np.ndarray:
    """[8, 8] scan of 0..16 -> [size, size] opacity of 0..255, bilinear in whole numbers."""
    side = len(digit)
    # Pixel centres in units of 1 / (2 * size) of a source pixel.
    position = np.clip((2 * np.arange(size) + 1) * side - size, 0, 2 * size * (side - 1))
    low = np.minimum(position // (2 * size), side - 2)
    part = position - low * 2 * size
    rows = digit[low] * (2 * size - part)[:, None] + digit[low + 1] * part[:, None]
    both = rows[:, low] * (2 * size - part) + rows[:, low + 1] * part
    return both * 255 // (16 * 4 * size * size)


def background(draws: Draws) -> np.ndarray:
    """[SIZE, SIZE, 3] a gradient between two colours of similar brightness, with noise."""
    base = draws.integers(0, 255)
    first, second = (np.clip(base + draws.integers(-40, 40, 3), 0, 255) for _ in range(2))
    across, down = draws.integers(-8, 8), draws.integers(-8, 8)
    y, x = np.mgrid[:SIZE, :SIZE]
    slope = across * x + down * y
    slope = (slope - slope.min()) * 255 // max(1, int(slope.max() - slope.min()))
    colours = first * (255 - slope[..., None]) + second * slope[..., None]
    noise = draws.integers(0, 24)
    noise = draws.integers(-noise, noise, SIZE * SIZE * 3).reshape(SIZE, SIZE, 3)
    return np.clip(colours // 255 + noise, 0, 255)


def covers_too_much(box: tuple[int, int, int, int], others: list[tuple[int, int, int, int]]) -> bool:
    """Whether ``box`` or one of the others (x, y, w, h) is covered by more than MAX_COVERED percent."""
    x, y, w, h = box
    for a, b, c, d in others:
        shared = max(0, min(x + w, a + c) - max(x, a)) * max(0, min(y + h, b + d) - max(y, b))
        if 100 * shared > MAX_COVERED * min(w * h, c * d):
            return True
    return False


def draw_image(draws: Draws, digits: list[np.ndarray]) -> tuple[np.ndarray, list[tuple[int, tuple]]]:
    """A picture [SIZE, SIZE, 3] uint8 with the scans, and (which scan, box as x, y, w, h) of each that found room."""
    image, boxes = background(draws), []
    for index, digit in enumerate(digits):
        for _ in range(20):
            opacity = upscale(digit, draws.integers(*DIGIT_SIZE))
            rows, columns = (np.flatnonzero((opacity >= INK).any(axis)) for axis in (1, 0))
            opacity = opacity[rows[0] : rows[-1] + 1, columns[0] : columns[-1] + 1]
            h, w = opacity.shape
            x, y = draws.integers(0, SIZE - w), draws.integers(0, SIZE - h)
            colour = draws.integers(0, 255, 3)
            behind = image[y : y + h, x : x + w]
            contrast = abs(int(colour.sum()) - int(behind.sum()) // (h * w)) // 3
            box = (x, y, w, h)
            if contrast >= MIN_CONTRAST and not covers_too_much(box, [other for _, other in boxes]):
                opacity = opacity[..., None]
                image[y : y + h, x : x + w] = (behind * (255 - opacity) + colour * opacity) // 255
                boxes.append((index, box))
                break
    return image.astype(np.uint8), boxes


def png(image: np.ndarray) -> bytes:
    """[H, W, 3] uint8 RGB -> a PNG file whose pixels are stored uncompressed."""
    height, width, _ = image.shape
    rows = np.zeros((height, 1 + 3 * width), np.uint8)  # the first byte of a row says: no filter
    rows[:, 1:] = image.reshape(height, -1)
    data = rows.tobytes()
    blocks = [data[i : i + 65535] for i in range(0, len(data), 65535)]
    stream = b"\x78\x01"
    for i, block in enumerate(blocks):
        stream += struct.pack("<BHH", i == len(blocks) - 1, len(block), len(block) ^ 0xFFFF) + block
    stream += struct.pack(">I", zlib.adler32(data))

    def chunk(kind: bytes, content: bytes) -> bytes:
        return struct.pack(">I", len(content)) + kind + content + struct.pack(">I", zlib.crc32(kind + content))

    header = struct.pack(">IIBBBBB", width, height, 8, 2, 0, 0, 0)
    return b"\x89PNG\r\n\x1a\n" + chunk(b"IHDR", header) + chunk(b"IDAT", stream) + chunk(b"IEND", b"")


def write_split(folder: Path, split: str, scans: np.ndarray, labels: np.ndarray) -> None:
    """Write ``{split}/*.png`` and ``{split}.json``, going through the scans in random order, again and again."""
    draws = Draws(SEED[split])
    images, annotations, queue = [], [], []
    (folder / split).mkdir()
    for image_id in range(1, NUM_IMAGES[split] + 1):
        chosen = []
        for _ in range(draws.integers(*NUM_DIGITS)):
            queue = queue or draws.shuffled(len(scans)).tolist()
            chosen.append(queue.pop())
        image, boxes = draw_image(draws, [scans[i] for i in chosen])
        file_name = f"{image_id:04}.png"
        (folder / split / file_name).write_bytes(png(image))
        images.append({"id": image_id, "file_name": file_name, "width": SIZE, "height": SIZE})
        annotations += [
            {"image_id": image_id, "category_id": int(labels[chosen[i]]) + 1, "bbox": list(box)} for i, box in boxes
        ]
    write_coco(folder / f"{split}.json", images, annotations, [str(digit) for digit in range(10)])


def prepare(folder: Path) -> None:
    """Write the dataset into ``folder`` unless it is there, whole."""
    if is_complete(folder, RECIPE):
        print(f"{folder}: the digits are there already.")
        return
    source = load_digits()
    scans, labels = source.images.astype(np.int64), source.target
    order = Draws(SEED["split"]).shuffled(len(scans))
    splits = {"test": order[:NUM_TEST_DIGITS], "train": order[NUM_TEST_DIGITS:]}
    with whole_folder(folder, RECIPE) as temporary:
        for split, index in splits.items():
            write_split(temporary, split, scans[index], labels[index])
    print(f"{folder}: wrote {NUM_IMAGES['train']} training and {NUM_IMAGES['test']} test pictures of digits.")


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--output", type=Path, default=Path("datasets/digits"), help="folder to write (%(default)s)")
    prepare(parser.parse_args().output)
