"""``python -m benchmarks loader``: images a second of the training data, on pictures made for it."""

import argparse
import copy
import math
import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from detectron2.structures import BoxMode
from PIL import Image

from codetr_d2.data.loader import build_train_loader
from codetr_d2.data.mapper import CoDETRDatasetMapper
from codetr_d2.data.samplers import seed_rng
from codetr_d2.engine import check_config

from .machine import Stopwatch, describe_machine
from .model import read_config
from .report import machine_line, plot_bars, print_table, save

__all__ = ["benchmark_loader", "make_dataset"]

HEIGHT, WIDTH = 480, 640
POLYGON_CORNERS = 24
REST = "reading, boxes, masks"


def make_dataset(folder: Path, num_images: int, num_objects: int, num_classes: int) -> list[dict]:
    """Write JPEGs, noise on smooth colours, and return detectron2's dicts for them, with ellipses as objects."""
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * math.pi, POLYGON_CORNERS, endpoint=False)
    records = []
    for number in range(num_images):
        colours = Image.fromarray(rng.integers(0, 256, (12, 16, 3), dtype=np.uint8)).resize((WIDTH, HEIGHT))
        pixels = np.asarray(colours, dtype=np.float64) + rng.normal(0, 12, (HEIGHT, WIDTH, 3))
        path = folder / f"{number}.jpg"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(path, quality=90)
        annotations = []
        for _ in range(num_objects):
            radii = rng.uniform(0.03, 0.2, 2) * (WIDTH, HEIGHT)
            centre = rng.uniform(radii, np.subtract((WIDTH, HEIGHT), radii))
            polygon = centre + np.stack((np.cos(angles), np.sin(angles)), axis=1) * radii
            annotations.append(
                {
                    "bbox": [*polygon.min(0), *polygon.max(0)],
                    "bbox_mode": BoxMode.XYXY_ABS,
                    "category_id": int(rng.integers(num_classes)),
                    "iscrowd": 0,
                    "segmentation": [polygon.flatten().tolist()],
                }
            )
        records.append(
            {
                "file_name": str(path),
                "image_id": number,
                "height": HEIGHT,
                "width": WIDTH,
                "annotations": annotations,
            }
        )
    return records


def measure_mapper(mapper: CoDETRDatasetMapper, records: list[dict], num_images: int) -> dict:
    """Images a second in this process, on one thread as in a worker, and how much of the time augmentations take."""
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    seed_rng(0)
    mapper = copy.copy(mapper)  # changed below
    augmentations, watch = mapper.augmentations, Stopwatch()

    def timed(picture):
        watch.lap(REST)
        transforms = augmentations(picture)
        watch.lap("augmentation")
        return transforms

    mapper.augmentations = timed
    mapper(records[0])
    watch.restart()
    for i in range(num_images):
        mapper(records[i % len(records)])
    watch.lap(REST)
    torch.set_num_threads(threads)
    seconds = sum(watch.seconds.values())
    return {"seconds": seconds, "images_per_second": num_images / seconds, "parts": dict(watch.seconds)}


def measure_loader(cfg, mapper: CoDETRDatasetMapper, records: list[dict], num_images: int) -> dict:
    """Images a second of the loader, from when its workers have filled their queues once."""
    batch = cfg.SOLVER.IMS_PER_BATCH
    warm_up = 2 * max(1, cfg.DATALOADER.NUM_WORKERS)  # batches that workers make ahead
    batches = math.ceil(num_images / batch)
    iterator = iter(build_train_loader(cfg, records, mapper))
    for _ in islice(iterator, warm_up):
        pass
    start = time.perf_counter()
    for _ in islice(iterator, batches):
        pass
    seconds = time.perf_counter() - start
    return {"seconds": seconds, "images_per_second": batches * batch / seconds}


def benchmark_loader(args: argparse.Namespace) -> None:
    """The command ``loader``."""
    cfg = read_config(args, "cpu")
    check_config(cfg)
    machine = describe_machine("cpu", args.threads)
    name = Path(args.config_file).stem
    print(f"{name}, {args.objects} objects in an image; {machine_line(machine)}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        records = make_dataset(Path(folder), args.files, args.objects, cfg.MODEL.CODETR.NUM_CLASSES)
        mapper = CoDETRDatasetMapper(cfg, True, records=records)
        alone = measure_mapper(mapper, records, args.images)
        loader = measure_loader(cfg, mapper, records, args.images)
    workers = cfg.DATALOADER.NUM_WORKERS
    report = {
        "command": "loader",
        "config": name,
        "options": args.opts,
        "objects": args.objects,
        "images": args.images,
        "machine": machine,
        "mapper": alone,
        "loader": {**loader, "workers": workers, "images_per_batch": cfg.SOLVER.IMS_PER_BATCH},
    }
    print_table(
        [
            {"what": "the mapper alone, in one process", "images/s": f"{alone['images_per_second']:.1f}"},
            {"what": f"the loader, {workers} processes", "images/s": f"{loader['images_per_second']:.1f}"},
        ]
    )
    print()
    milliseconds = {part: 1000 * seconds / args.images for part, seconds in alone["parts"].items()}
    print_table(
        [
            {"part": part, "ms an image": f"{value:.1f}", "share": f"{alone['parts'][part] / alone['seconds']:.0%}"}
            for part, value in milliseconds.items()
        ]
    )
    if args.output:
        rates = {
            "mapper, one process": alone["images_per_second"],
            f"loader, {workers} processes": loader["images_per_second"],
        }
        quantities = {"images a second": {name: rates}, "milliseconds an image": {"mapper": milliseconds}}
        save(report, plot_bars(f"{name}, {args.objects} objects", quantities), args.output)
