"""``python -m benchmarks annotations`` and ``evaluation``: in turn with detectron2 and with pycocotools.

Each run is a process of its own, so that none has the memory, or the files in memory, of another.
"""

import argparse
import contextlib
import io
import json
import os
import statistics
import tempfile
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import numpy as np
from detectron2.data.datasets import load_coco_json
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

from codetr_d2.data.annotations import read_coco_json
from codetr_d2.evaluation import average_precisions

from .machine import describe_machine, resident_bytes
from .report import machine_line, measurement_rows, plot_bars, print_table, save

__all__ = ["benchmark_annotations", "benchmark_evaluation", "make_annotations", "make_detections"]

HEIGHT, WIDTH, NUM_CLASSES = 480, 640, 80
POLYGON_CORNERS = 26


def make_annotations(num_images: int, num_objects: int) -> dict:
    """A file in COCO's format: ellipses as objects, a hundredth of them crowds."""
    rng = np.random.default_rng(0)
    angles = np.linspace(0, 2 * np.pi, POLYGON_CORNERS, endpoint=False)
    circle = np.stack((np.cos(angles), np.sin(angles)), axis=1) / 2
    images = [
        {"id": i, "file_name": f"{i:012}.jpg", "height": HEIGHT, "width": WIDTH} for i in range(1, num_images + 1)
    ]
    owners = rng.integers(1, num_images + 1, num_objects).tolist()
    classes = rng.integers(1, NUM_CLASSES + 1, num_objects).tolist()
    sizes = rng.uniform(4, 200, (num_objects, 2))
    corners = rng.uniform(0, 1, (num_objects, 2)) * ((WIDTH, HEIGHT) - sizes)
    crowds = (rng.random(num_objects) < 0.01).astype(int).tolist()
    annotations = []
    for i, (corner, size) in enumerate(zip(corners, sizes)):
        polygon = (corner + size / 2 + circle * size).round(2).ravel().tolist()
        mask = {"size": [HEIGHT, WIDTH], "counts": [1000, 200, HEIGHT * WIDTH - 1200]} if crowds[i] else [polygon]
        box = {"id": i + 1, "image_id": owners[i], "category_id": classes[i], "iscrowd": crowds[i]}
        box.update(bbox=np.concatenate((corner, size)).round(2).tolist(), area=float(size.prod() * np.pi / 4))
        annotations.append({**box, "segmentation": mask})
    categories = [{"id": i, "name": f"class {i}"} for i in range(1, NUM_CLASSES + 1)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def make_detections(data: dict, per_image: int) -> list[dict]:
    """Boxes in COCO's format of results, a tenth of which lie on objects."""
    rng = np.random.default_rng(1)
    owned = {image["id"]: [] for image in data["images"]}
    for x in data["annotations"]:
        owned[x["image_id"]].append(x)
    results = []
    for image_id, objects in owned.items():
        boxes = rng.uniform(0, 1, (per_image, 4)) * (WIDTH - 100, HEIGHT - 100, 100, 100) + (0, 0, 2, 2)
        classes = rng.integers(1, NUM_CLASSES + 1, per_image)
        for i in range(min(len(objects), per_image)):
            boxes[i] = np.array(objects[i]["bbox"]) + rng.normal(0, 3, 4).clip(-1.5)
            classes[i] = objects[i]["category_id"]
        scores = rng.random(per_image).tolist()
        for box, category, score in zip(boxes.round(2).tolist(), classes.tolist(), scores):
            results.append({"image_id": image_id, "category_id": category, "bbox": box, "score": score})
    return results


def _ours(path: str):
    return read_coco_json(path, lambda image: os.path.join("images", image["file_name"]))


def _read_ours(path: str) -> float:
    start = time.perf_counter()
    _ours(path)
    return time.perf_counter() - start


def _read_detectron2(path: str) -> float:
    start = time.perf_counter()
    load_coco_json(path, "images")
    return time.perf_counter() - start


def _evaluate_ours(path: str) -> float:
    dataset, results = _ours(path), json.loads(Path(f"{path}.results").read_text())
    for x in results:
        x["category_id"] -= 1
    start = time.perf_counter()
    average_precisions(dataset, results, "bbox", "coco")
    return time.perf_counter() - start


def _evaluate_pycocotools(path: str) -> float:
    results = json.loads(Path(f"{path}.results").read_text())
    with contextlib.redirect_stdout(io.StringIO()):
        truth = COCO(path)
        start = time.perf_counter()
        evaluation = COCOeval(truth, truth.loadRes(results), "bbox")
        evaluation.evaluate()
        evaluation.accumulate()
        evaluation.summarize()
        return time.perf_counter() - start


def _in_turn(path: str, sides: dict[str, Callable[[str], float]], repeat: int, images: int) -> dict:
    """Seconds and the most memory of each side, run by turns."""
    measured = {name: {"seconds": [], "peak_bytes": 0} for name in sides}
    for _ in range(repeat):
        for name, run in sides.items():
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as process:
                measured[name]["seconds"].append(process.submit(run, path).result())
                peak = process.submit(resident_bytes, "VmHWM").result()
            measured[name]["peak_bytes"] = peak and max(peak, measured[name]["peak_bytes"])
    for x in measured.values():
        x["median"] = statistics.median(x["seconds"])
        x["images_per_second"] = images / x["median"]
    return measured


def _benchmark(args: argparse.Namespace, title: str, sides: dict[str, Callable[[str], float]], results: int) -> None:
    machine = describe_machine("cpu", args.threads)
    print(f"{title}; {machine_line(machine)}\n", flush=True)
    with tempfile.TemporaryDirectory() as folder:
        path = os.path.join(folder, "annotations.json")
        data = make_annotations(args.images, args.objects)
        Path(path).write_text(json.dumps(data))
        if results:
            Path(f"{path}.results").write_text(json.dumps(make_detections(data, results)))
        del data
        measured = _in_turn(path, sides, args.repeat, args.images)
    print_table(measurement_rows("images", [{"value": args.images, "sides": measured}]))
    if args.output is not None:
        report = {"title": title, "machine": machine, "images": args.images, "objects": args.objects, "sides": measured}
        seconds = {name: {"": x["seconds"]} for name, x in measured.items()}
        save(report, plot_bars(title, {"seconds": seconds}), args.output)


def benchmark_annotations(args: argparse.Namespace) -> None:
    """The command ``annotations``."""
    title = f"reading {args.images} images with {args.objects} objects"
    _benchmark(args, title, {"ours, checked": _read_ours, "detectron2, not checked": _read_detectron2}, 0)


def benchmark_evaluation(args: argparse.Namespace) -> None:
    """The command ``evaluation``."""
    title = f"box AP of {args.images} images with {args.objects} objects and {args.detections} detections in each image"
    _benchmark(args, title, {"ours": _evaluate_ours, "pycocotools": _evaluate_pycocotools}, args.detections)
