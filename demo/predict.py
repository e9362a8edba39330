#!/usr/bin/env python
"""Detect objects in pictures, folders of pictures and videos, and draw them.

    python demo/predict.py picture.jpg folder video.mp4 --output found
    python demo/predict.py picture.jpg --output found --config-file output/my_run/config.yaml --score-threshold 0.5

Without --config-file it is the model that `make quickstart` trained. The output folder gets each picture with its
detections drawn on it, each video likewise, and detections.json: for each picture (or frame) the file, its size, and
detections with category_name, category_id (counted from 0), bbox ([x, y, width, height] in pixels) and score. A model
with masks adds segmentation (COCO's run-length encoding) and, where masks have scores of their own, mask_score.
"""

import argparse
import json
import mimetypes
import sys
from collections.abc import Iterator
from pathlib import Path

import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import Instances
from PIL import Image
from tqdm import tqdm

import codetr_d2  # noqa: F401 (registers the model)
from codetr_d2.config.config_file import load_config, resolve_device
from codetr_d2.data import read_image
from codetr_d2.errors import InputError
from codetr_d2.evaluation import to_coco_results
from codetr_d2.inference import Predictor
from codetr_d2.ops import keep_freed_memory
from codetr_d2.visualization import draw_predictions

QUICK_START_CONFIG = Path("output/quick_start/digits/config.yaml")
LONG_SIDE = 640  # pixels that smaller pictures are enlarged to, so that names and scores can be read


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="a picture, a folder of them, or a video")
    parser.add_argument("--output", required=True, type=Path, help="folder for the drawn pictures and detections.json")
    parser.add_argument(
        "--config-file",
        type=Path,
        default=QUICK_START_CONFIG,
        help="config.yaml in the output folder of a training run (default: %(default)s)",
    )
    parser.add_argument("--weights", help="checkpoint (default: model_final.pth beside the config file)")
    parser.add_argument("--score-threshold", type=float, default=0.3, help="least score to draw (%(default)s)")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="config options to change")
    return parser.parse_args(argv)


def find_weights(config_file: Path, weights: str | None) -> str:
    """The checkpoint to use: the one asked for, or the one that training left beside its config."""
    if not config_file.is_file():
        hint = "Run `make quickstart` first, or name" if config_file == QUICK_START_CONFIG else "Name"
        raise InputError(f"{config_file} does not exist. {hint} a config with --config-file.")
    if weights is None:
        weights = str(config_file.with_name("model_final.pth"))
        if not Path(weights).is_file():
            raise InputError(f"There is no model_final.pth beside {config_file}. Name a checkpoint with --weights.")
    return weights


def is_video(path: Path) -> bool:
    return (mimetypes.guess_type(path.name)[0] or "").startswith("video/")


def find_files(inputs: list[Path]) -> list[Path]:
    """The pictures and videos that the inputs name, folders replaced by what is in them."""
    Image.init()
    picture_suffixes = set(Image.registered_extensions())
    files = []
    for path in inputs:
        if path.is_dir():
            found = [x for x in sorted(path.iterdir()) if x.suffix.lower() in picture_suffixes or is_video(x)]
            if not found:
                raise InputError(f"The folder {path} holds no picture and no video. Name another one.")
            files += [x for x in found if x.is_file()]
        elif path.is_file():
            files.append(path)
        else:
            raise InputError(f"{path} does not exist. Name a picture, a folder of pictures, or a video.")
    return list(dict.fromkeys(files))


def output_files(files: list[Path], folder: Path) -> dict[Path, Path]:
    """Where the drawing of each file goes: its name as .png or .mp4, made longer where two would meet."""
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output {folder} is a file. Name a folder.")
    targets: dict[Path, Path] = {}
    for file in files:
        suffix = ".mp4" if is_video(file) else ".png"
        candidates = [file.stem, file.name, *(f"{file.name}-{i}" for i in range(2, len(files) + 2))]
        taken = set(targets.values())
        targets[file] = next(x for x in (folder / f"{c}{suffix}" for c in candidates) if x not in taken)
    overwritten = {x.resolve() for x in files} & {x.resolve() for x in targets.values()}
    if overwritten:
        raise InputError(f"{sorted(overwritten)[0]} would be overwritten. Name another folder with --output.")
    return targets


class Detector:
    """A ``Predictor`` that draws what it finds and describes it for detections.json."""

    def __init__(self, cfg: CfgNode, weights: str, score_threshold: float):
        cfg.MODEL.WEIGHTS = weights
        self.predictor = Predictor(cfg)
        self.names = list(cfg.MODEL.CODETR.CLASS_NAMES)
        self.score_threshold = score_threshold

    def __call__(self, image: np.ndarray, long_side: int) -> tuple[np.ndarray, dict]:
        """[H, W, 3] uint8 BGR -> its drawing, [H', W', 3] uint8 RGB, and its entry in detections.json."""
        found: Instances = self.predictor(image)["instances"].to("cpu")
        found = found[found.scores >= self.score_threshold]
        detections = []
        for detection in to_coco_results(found, 0):
            category = detection["category_id"]
            name = self.names[category] if category < len(self.names) else str(category)
            detections.append({"category_name": name, **{k: v for k, v in detection.items() if k != "image_id"}})
        entry = {"height": image.shape[0], "width": image.shape[1], "detections": detections}
        return draw_predictions(image, found, self.names, long_side), entry


def process_picture(detector: Detector, file: Path, target: Path) -> Iterator[dict]:
    drawing, entry = detector(read_image(file, "BGR"), LONG_SIDE)
    Image.fromarray(drawing).save(target)
    yield {"file_name": str(file), **entry}


def process_video(detector: Detector, file: Path, target: Path) -> Iterator[dict]:
    video = cv2.VideoCapture(str(file))
    writer = None
    try:
        count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        progress = tqdm(total=count if count > 0 else None, desc=file.name, unit="frame", leave=False)
        while True:
            is_frame, frame = video.read()
            if not is_frame:
                break
            drawing, entry = detector(frame, 0)
            if writer is None:
                size = (drawing.shape[1], drawing.shape[0])
                rate = video.get(cv2.CAP_PROP_FPS) or 25.0
                writer = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
                if not writer.isOpened():
                    raise InputError(f"{target} cannot be written: this build of OpenCV has no mp4 encoder.")
            writer.write(np.ascontiguousarray(drawing[:, :, ::-1]))
            yield {"file_name": str(file), "frame": progress.n, **entry}
            progress.update()
        progress.close()
        if writer is None:
            raise InputError(f"{file} is not a video that can be read. Convert it to mp4.")
    finally:
        video.release()
        if writer is not None:
            writer.release()


def run(args: argparse.Namespace) -> None:
    if not 0 <= args.score_threshold <= 1:
        raise InputError(f"--score-threshold is {args.score_threshold}. Give a number from 0 to 1.")
    targets = output_files(find_files(args.inputs), args.output)
    weights = find_weights(args.config_file, args.weights)
    cfg = load_config(str(args.config_file), args.opts)
    cfg.MODEL.DEVICE = resolve_device(cfg)
    if cfg.MODEL.DEVICE == "cpu":
        keep_freed_memory()
    detector = Detector(cfg, weights, args.score_threshold)
    args.output.mkdir(parents=True, exist_ok=True)
    entries, failures = [], []
    for file, target in tqdm(targets.items(), unit="file"):
        process = process_video if is_video(file) else process_picture
        try:
            entries += process(detector, file, target)
        except InputError as error:
            failures.append(str(error))
    detections_file = args.output / "detections.json"
    detections_file.write_text(json.dumps(entries, indent=1) + "\n")
    found = sum(len(x["detections"]) for x in entries)
    print(f"{len(targets) - len(failures)} of {len(targets)} files done, {found} detections: {detections_file}")
    if failures:
        raise InputError("\n".join(failures))


def main(argv: list[str] | None = None) -> None:
    try:
        run(parse_arguments(argv))
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
