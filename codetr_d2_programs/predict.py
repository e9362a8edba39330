"""Detect objects in pictures, folders of pictures and videos, and draw them.

    codetr_d2 predict picture.jpg folder video.mp4 --output found --config-file output/my_run/config.yaml
    codetr_d2 predict picture.jpg --output found --config-file CONFIG --weights FILE --score-threshold 0.5

CONFIG may be a name of the model zoo, like co_dino/co_dino_5scale_r50_1x_coco.yaml, and FILE an hf:// address. Without
--config-file it is the model that `make quickstart` trained. Folders are searched with all their subfolders,
and files are told by what they hold. The output folder gets each picture with its detections drawn on it, each video
likewise, and detections.json: for each picture (or frame) the file, its size, and detections with category_name,
category_id (counted from 0), bbox ([x, y, width, height] in pixels) and score. A model with masks adds segmentation
(COCO's run-length encoding) and, where masks have scores of their own, mask_score. Ctrl-C writes what is done so far.
"""

import argparse
import contextlib
import os
import signal
import sys
import warnings
from collections.abc import Iterator
from pathlib import Path

# FFmpeg's remarks on files that are no videos, or damaged ones: what is wrong with a file is said here.
os.environ.setdefault("OPENCV_LOG_LEVEL", "ERROR")
os.environ.setdefault("OPENCV_FFMPEG_LOGLEVEL", "-8")

# isort: split
import cv2
import numpy as np
from detectron2.config import CfgNode
from detectron2.structures import Instances
from PIL import Image
from tqdm import tqdm

import codetr_d2  # noqa: F401 (registers the model)
from codetr_d2.config.config_file import load_config, resolve_device
from codetr_d2.config.zoo import find_config_file
from codetr_d2.data import read_image
from codetr_d2.errors import InputError
from codetr_d2.evaluation import to_coco_results
from codetr_d2.inference import DetectionsFile, Predictor, cannot_be_written, find_media, name_drawings
from codetr_d2.ops import keep_freed_memory
from codetr_d2.visualization import draw_predictions

QUICK_START_CONFIG = Path("output/quick_start/digits/config.yaml")
LONG_SIDE = 640  # pixels that smaller pictures are enlarged to, so that names and scores can be read


def to_path(text: str) -> Path:
    return Path(os.path.expanduser(text))


def parse_arguments(argv: list[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument(
        "inputs", nargs="+", type=to_path, metavar="INPUT", help="a picture, a video, or a folder of them"
    )
    parser.add_argument(
        "--output", required=True, type=to_path, help="folder for the drawn pictures and detections.json"
    )
    parser.add_argument(
        "--config-file",
        type=to_path,
        default=QUICK_START_CONFIG,
        help="config.yaml in the output folder of a training run (default: %(default)s)",
    )
    parser.add_argument(
        "--weights", type=os.path.expanduser, help="checkpoint (default: model_final.pth beside the config file)"
    )
    parser.add_argument("--score-threshold", type=float, default=0.3, help="least score to draw (%(default)s)")
    parser.add_argument("--opts", nargs="+", default=[], metavar="KEY VALUE", help="config options to change")
    return parser.parse_args(argv)


def find_weights(config_file: Path, weights: str | None) -> str:
    """The checkpoint to use: the one asked for, or the one that training left beside its config."""
    if config_file == QUICK_START_CONFIG and not config_file.is_file():
        raise InputError(
            f"Name a config with --config-file. Without it, it is {config_file}, which does not exist: "
            "`make quickstart` in the project's folder makes it."
        )
    file = Path(find_config_file(str(config_file)))
    if weights is None:
        weights = str(file.with_name("model_final.pth"))
        if not Path(weights).is_file():
            raise InputError(f"There is no model_final.pth beside {file}. Name a checkpoint with --weights.")
    return weights


class FileProblem(InputError):
    """Of one file; the others are done all the same."""


class Detector:
    """A ``Predictor`` that draws what it finds and describes it for detections.json."""

    def __init__(self, cfg: CfgNode, score_threshold: float):
        self.predictor = Predictor(cfg)
        self.names = list(cfg.MODEL.CODETR.CLASS_NAMES)
        self.score_threshold = score_threshold

    def __call__(self, image: np.ndarray, long_side: int) -> tuple[np.ndarray, dict]:
        """[H, W, 3] uint8 BGR -> its drawing, [H', W', 3] uint8 RGB, and its entry in detections.json."""
        found: Instances = self.predictor(image)["instances"]
        kept = found.scores >= self.score_threshold
        found = (found if kept.all() else found[kept]).to("cpu")  # masks of a large picture are not copied in vain
        detections = []
        for detection in to_coco_results(found, 0):
            category = detection["category_id"]
            name = self.names[category] if category < len(self.names) else str(category)
            detections.append({"category_name": name, **{k: v for k, v in detection.items() if k != "image_id"}})
        entry = {"height": image.shape[0], "width": image.shape[1], "detections": detections}
        return draw_predictions(image, found, self.names, long_side), entry


def process_picture(detector: Detector, file: Path, target: Path) -> Iterator[dict]:
    try:
        image = read_image(file, "BGR")
    except InputError as error:
        raise FileProblem(str(error)) from error
    drawing, entry = detector(image, LONG_SIDE)
    # Not by Pillow, which takes ten times as long for a large picture.
    _, content = cv2.imencode(".png", cv2.cvtColor(drawing, cv2.COLOR_RGB2BGR, dst=drawing))
    try:
        target.write_bytes(content)
    except BaseException as error:  # Ctrl-C too
        target.unlink(missing_ok=True)
        if isinstance(error, OSError):
            raise cannot_be_written(target, error.strerror) from error
        raise
    yield {"file_name": str(file), **entry}


def process_video(detector: Detector, file: Path, target: Path) -> Iterator[dict]:
    video = cv2.VideoCapture(str(file))
    writer = None
    try:
        count = int(video.get(cv2.CAP_PROP_FRAME_COUNT))
        with tqdm(total=count if count > 0 else None, desc=file.name, unit="frame", leave=False) as progress:
            while True:
                is_frame, frame = video.read()
                if not is_frame:
                    break
                drawing, entry = detector(frame, 0)
                if writer is None:
                    # Encoders take even sizes only.
                    width, height = size = [x + x % 2 for x in drawing.shape[1::-1]]
                    rate = video.get(cv2.CAP_PROP_FPS)
                    rate = rate if 0 < rate <= 1000 else 25.0  # of some streams it is not known
                    writer = cv2.VideoWriter(str(target), cv2.VideoWriter_fourcc(*"mp4v"), rate, size)
                    if not writer.isOpened():
                        raise FileProblem(f"{target} cannot be written: this build of OpenCV has no mp4 encoder.")
                writer.write(fill_up(cv2.cvtColor(drawing, cv2.COLOR_RGB2BGR), width, height))
                yield {"file_name": str(file), "frame": progress.n, **entry}
                progress.update()
        if writer is None:
            raise FileProblem(f"{file} is not a video that can be read. Convert it to mp4.")
    finally:
        video.release()
        if writer is not None:
            writer.release()
    if not cv2.VideoCapture(str(target)).isOpened():  # the encoder doesn't say so
        raise cannot_be_written(target, "its end is missing")


def make_folder(folder: Path) -> None:
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise cannot_be_written(folder, error.strerror) from error


def fill_up(frame: np.ndarray, width: int, height: int) -> np.ndarray:
    """Give a frame the size of its video: that of the first frame, which others of a stream may not have."""
    rows, columns = frame.shape[:2]
    if not (0 <= height - rows <= 1 and 0 <= width - columns <= 1):
        return cv2.resize(frame, (width, height), interpolation=cv2.INTER_AREA)
    return cv2.copyMakeBorder(frame, 0, height - rows, 0, width - columns, cv2.BORDER_REPLICATE)


def run(args: argparse.Namespace) -> None:
    """Do what the command line says.

    Raises:
        KeyboardInterrupt: with what was done so far, which is written.
    """
    if not 0 <= args.score_threshold <= 1:
        raise InputError(f"--score-threshold is {args.score_threshold}. Give a number from 0 to 1.")
    if args.output.is_file():
        raise InputError(f"--output {args.output} is a file. Name a folder.")
    files, left_out = find_media(args.inputs, args.output)
    targets = name_drawings(files, args.output)
    weights = find_weights(args.config_file, args.weights)
    cfg = load_config(str(args.config_file), args.opts)
    cfg.MODEL.WEIGHTS = weights
    cfg.MODEL.DEVICE = resolve_device(cfg)
    if cfg.MODEL.DEVICE == "cpu":
        keep_freed_memory()
    if left_out:
        print(f"Left out, as hidden or neither picture nor video: {len(left_out)}, such as {left_out[0]}")
    detections = DetectionsFile(args.output / "detections.json")
    num_done, num_found, failures = 0, 0, []
    try:
        with detections:
            detector = Detector(cfg, args.score_threshold)
            for file, target in zip(tqdm(files, unit="file"), targets):
                make_folder(target.parent)
                process = process_video if file.is_video else process_picture
                try:
                    with contextlib.closing(process(detector, file.path, target)) as entries:
                        for entry in entries:
                            detections.add(entry)
                            num_found += len(entry["detections"])
                    num_done += 1
                except FileProblem as error:
                    failures.append(str(error))
    except KeyboardInterrupt:
        where = f": {detections.path}" if detections.number else ""
        done = f"{num_done} of {len(files)} files done, {num_found} detections{where}"
        raise KeyboardInterrupt(done) from None
    print(f"{num_done} of {len(files)} files done, {num_found} detections: {detections.path}")
    if failures:
        raise InputError("\n".join(failures))


def main(argv: list[str] | None = None) -> None:
    if argv is None:  # the whole process is this program
        signal.signal(signal.SIGTERM, signal.default_int_handler)  # as Ctrl-C: what is done is written
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # pictures of 100 megapixels are welcome
    try:
        run(parse_arguments(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as interrupt:
        print(": ".join(("interrupted", *interrupt.args)), file=sys.stderr)
        sys.exit(130)
