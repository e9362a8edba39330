#!/usr/bin/env python
"""Detect objects in pictures, folders of pictures and videos with an exported model, and draw them.

    pip install numpy pillow opencv-python-headless onnxruntime    # openvino in place of onnxruntime for model.xml
    python predict_exported.py model.onnx picture.jpg folder video.mp4 --output found

The model is what tools/export.py of codetr_d2 wrote: model.onnx for ONNX Runtime, or model.xml and model.bin for
OpenVINO. This file needs nothing else of that project: copy it into yours (Apache License 2.0). In Python:

    detector = Detector("model.onnx")
    found = detector(image, score_threshold=0.3)  # {"boxes": [N, 4] xyxy in pixels, "scores": [N], "classes": [N], ...}
    cv2.imwrite("drawn.png", draw(image, found, detector.class_names))

The output folder gets each picture with its detections drawn on it, each video likewise, and detections.json, all as
demo/predict.py of codetr_d2 writes them.
"""

import argparse
import colorsys
import functools
import importlib.util
import json
import math
import mimetypes
import os
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

import cv2
import numpy as np
from PIL import Image, ImageDraw, ImageFont

LONG_SIDE = 640  # pixels that smaller pictures are enlarged to, so that names and scores can be read
FONT = "DejaVuSans.ttf"  # of the names; name the file of another font where its letters are missing


class InputError(Exception):
    """Something that the user can mend, in one line."""


class Detector:
    """An exported model as one call: picture in, detections out.

    Args:
        file: model.onnx or model.xml.

    Attributes:
        class_names: by class index.

    Raises:
        InputError: the runtime is not installed, or the file is no such model.
    """

    def __init__(self, file: str | os.PathLike):
        file = Path(file)
        loaders = {".onnx": ("onnxruntime", _load_onnx), ".xml": ("openvino", _load_openvino)}
        if file.suffix not in loaders or not file.is_file():
            raise InputError(f"{file} is no model.onnx or model.xml. Name a file that tools/export.py wrote.")
        runtime, load = loaders[file.suffix]
        try:
            self._run, inputs, metadata = load(file)
        except ImportError as error:
            raise InputError(f"{file} needs {runtime} ({error}): pip install {runtime}") from error
        except Exception as error:  # each runtime has errors of its own
            reason = (str(error).strip() or type(error).__name__).splitlines()[-1]
            raise InputError(f"{file} cannot be loaded ({reason}). Export the model again.") from error
        if "class_names" not in metadata:
            raise InputError(f"{file} is a model of another kind. Name a file that tools/export.py wrote.")
        self.class_names: list[str] = json.loads(metadata["class_names"])
        self._min_size, self._max_size = int(metadata["min_size"]), int(metadata["max_size"])
        self._channels = inputs["images"][3]

    def __call__(self, image: np.ndarray, score_threshold: float = 0.0) -> dict[str, np.ndarray]:
        """Detect.

        Args:
            image: [H, W, 3] uint8, BGR as ``cv2.imread`` and :func:`read_image` give it.
            score_threshold: detections with a lower score are left out.

        Returns:
            By falling score: ``boxes`` [N, 4] float32, xyxy in pixels of ``image``; ``scores`` [N]; ``classes`` [N]
            int64; of models with masks also ``masks`` [N, H, W] bool, and of some ``mask_scores`` [N].

        Raises:
            InputError: the array is of another kind, or the model computes no finite numbers.
        """
        if getattr(image, "dtype", None) != np.uint8 or image.ndim != 3 or image.shape[2] != 3 or not image.size:
            raise InputError("the picture must be an array [height, width, 3] of uint8, BGR as cv2.imread gives it")
        height, width = image.shape[:2]
        picture = Image.fromarray(np.ascontiguousarray(image[:, :, ::-1]))
        if self._channels == 1:
            picture = picture.convert("L")
        if self._min_size:
            picture = picture.resize(resized(width, height, self._min_size, self._max_size), Image.Resampling.BILINEAR)
        batch = np.asarray(picture).reshape(1, picture.height, picture.width, self._channels)
        found = self._run({"images": batch, "sizes": np.array([batch.shape[1:3]], np.int64)})
        outputs = ("boxes", "scores", "classes", "masks", "mask_scores")
        found = {name: found[name][0] for name in outputs if name in found}
        if not np.isfinite(found["boxes"]).all():
            raise InputError("the model computes NaN or infinite numbers. Export another checkpoint, or in float32.")
        boxes = found["boxes"] * np.array([width / picture.width, height / picture.height] * 2, np.float32)
        found["boxes"] = boxes = boxes.clip(0, np.array([width, height] * 2, np.float32))
        kept = (found["scores"] > 0) & (found["scores"] >= score_threshold) & (boxes[:, 2:] > boxes[:, :2]).all(1)
        found = {name: values[kept] for name, values in found.items()}
        if "masks" in found:
            found["masks"] = paste_masks(found["masks"], found["boxes"], height, width)
        return found


def _load_onnx(file: Path) -> tuple[Callable[[dict], dict], dict[str, list], dict[str, str]]:
    """A function from inputs to outputs, the shapes of the inputs, and the metadata."""
    import onnxruntime

    session = onnxruntime.InferenceSession(str(file), providers=["CPUExecutionProvider"])
    names = [x.name for x in session.get_outputs()]
    shapes = {x.name: x.shape for x in session.get_inputs()}
    return lambda x: dict(zip(names, session.run(names, x))), shapes, session.get_modelmeta().custom_metadata_map


def _load_openvino(file: Path) -> tuple[Callable[[dict], dict], dict[str, list], dict[str, str]]:
    """As :func:`_load_onnx`."""
    import openvino

    core = openvino.Core()
    model = core.read_model(file)
    keys = [x for x in ("class_names", "min_size", "max_size") if model.has_rt_info(["codetr_d2", x])]
    metadata = {key: model.get_rt_info(["codetr_d2", key]).astype(str) for key in keys}
    shapes = {name: [d.get_max_length() for d in x.partial_shape] for x in model.inputs for name in x.names}
    # By default it computes in bfloat16 where the processor has it, and finds other boxes.
    compiled = core.compile_model(model, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    names = [name for x in model.outputs for name in x.names]

    def run(inputs: dict) -> dict:
        outputs = compiled(inputs)
        return {name: outputs[name] for name in names}

    return run, shapes, metadata


def resized(width: int, height: int, min_size: int, max_size: int) -> tuple[int, int]:
    """(width, height) with the shortest side at ``min_size`` and the longest at most at ``max_size``."""
    sides = [min_size / min(width, height) * x for x in (width, height)]
    sides[height < width] = float(min_size)
    shrink = min(1.0, max_size / max(sides))
    return tuple(max(1, int(x * shrink + 0.5)) for x in sides)


def paste_masks(masks: np.ndarray, boxes: np.ndarray, height: int, width: int) -> np.ndarray:
    """Masks inside boxes [N, s, s] (probabilities) and boxes [N, 4] -> [N, height, width] bool of the picture.

    The centre of each pixel is looked up in the mask, between four cells, with zeros around the mask.
    """
    pasted = np.zeros((len(masks), height, width), bool)
    for mask, box, target in zip(masks.astype(np.float32), boxes.astype(np.float32), pasted):
        cells, shares, spans = [], [], []
        for start, end, length in ((box[1], box[3], height), (box[0], box[2], width)):
            span = slice(max(0, math.floor(start)), min(length, math.ceil(end)))
            centres = np.arange(span.start, span.stop, dtype=np.float32) + np.float32(0.5)
            # In PyTorch's steps, the last of which it rounds once: that decides pixels midway between 0 and 1.
            place = (centres - start) / (end - start) * 2 - 1
            place = ((place + 1).astype(np.float64) * (len(mask) / 2) - 0.5).astype(np.float32)
            cells.append((np.floor(place).astype(int) + 2).clip(0, len(mask) + 2))  # of the padded mask
            shares.append(place - np.floor(place))
            spans.append(span)
        padded, (y, x), (down, right) = np.pad(mask, 2), cells, shares
        down = down[:, None]
        upper, lower = padded[y], padded[y + 1]
        value = upper[:, x] * ((1 - down) * (1 - right)) + upper[:, x + 1] * ((1 - down) * right)
        value = value + lower[:, x] * (down * (1 - right)) + lower[:, x + 1] * (down * right)
        target[tuple(spans)] = value >= 0.5
    return pasted


def encode_mask(mask: np.ndarray) -> dict:
    """[H, W] bool -> COCO's compressed run-length encoding."""
    places = np.flatnonzero(np.diff(mask.T.ravel().view(np.int8), prepend=0))
    counts = np.diff(places, prepend=0, append=mask.size).tolist()
    text = ""
    for i, count in enumerate(counts):
        rest, is_last = count - (counts[i - 2] if i > 2 else 0), False
        while not is_last:  # five bits at a time, the lowest first; the sixth says that more follow
            bits, rest = rest & 31, rest >> 5
            is_last = rest == (-1 if bits & 16 else 0)
            text += chr(48 + bits + (0 if is_last else 32))
    return {"size": list(mask.shape), "counts": text}


# ---- drawing


def draw(image: np.ndarray, found: dict[str, np.ndarray], class_names: Sequence[str], long_side: int = 0) -> np.ndarray:
    """Draw detections with class names and scores.

    Args:
        image: [H, W, 3] uint8, BGR.
        found: what :class:`Detector` gives.
        class_names: by class index; may be empty.
        long_side: smaller pictures are enlarged to this many pixels.

    Returns:
        [H', W', 3] uint8, BGR.
    """
    scale = max(1.0, long_side / max(image.shape[:2]))
    canvas = image.copy()
    if scale > 1:
        canvas = cv2.resize(canvas, None, fx=scale, fy=scale, interpolation=cv2.INTER_LINEAR)
    height, width = canvas.shape[:2]
    side = math.sqrt(height * width)  # what lines and letters grow with
    thickness = max(2, round(side / 400))
    boxes, classes = found["boxes"], found["classes"].tolist()
    corners = np.rint(boxes * scale).clip(0, (width - 1, height - 1) * 2).astype(int)
    # Bright colours, the same for a class in every picture; steps of the golden ratio keep them apart.
    colours = [tuple(round(255 * x) for x in colorsys.hsv_to_rgb(c * 0.618 % 1, 1, 1)[::-1]) for c in classes]
    largest_first = np.argsort(-(corners[:, 2:] - corners[:, :2]).prod(1), kind="stable").tolist()
    for i in largest_first if "masks" in found else ():
        _draw_mask(canvas, found["masks"][i], boxes[i], scale, colours[i], max(1, thickness // 2))
    margin = thickness // 2  # the whole line lies in the picture, also that of a box as large as it
    for i in largest_first:
        left, top, right, bottom = corners[i].clip(margin, None).tolist()
        right, bottom = min(right, width - 1 - margin), min(bottom, height - 1 - margin)
        cv2.rectangle(canvas, (left, top), (right, bottom), colours[i], thickness)
    taken = np.empty((0, 4), int)  # by labels, xyxy
    for box, c, score, colour in zip(corners.tolist(), classes, found["scores"].tolist(), colours):
        letters = _render(_name(c, class_names), f" {score:.0%}", max(12, round(side / 60)), width)
        h, w = letters.shape
        if h <= height and w <= width:
            x, y = _free_place(box, w, h, width, height, taken)
            taken = np.concatenate((taken, [[x, y, x + w, y + h]]))
            region, share = canvas[y : y + h, x : x + w], letters[..., None] / 255
            light = 255 - (255 - np.array(colour)) * 0.2
            region[:] = (region * 0.25 * (1 - share) + light * share).round()
    return canvas


def _name(index: int, class_names: Sequence[str]) -> str:
    return class_names[index] if index < len(class_names) else str(index)


def _draw_mask(
    canvas: np.ndarray, mask: np.ndarray, box: np.ndarray, scale: float, colour: tuple[int, int, int], thickness: int
) -> None:
    """Colour a mask inside its box, and draw its outline."""
    left, top = np.floor(box[:2]).clip(0).astype(int)
    right, bottom = np.ceil(box[2:]).astype(int)
    mask = mask[top:bottom, left:right].astype(np.uint8)
    if not mask.size:
        return
    (y0, x0), (y1, x1) = [
        (round(y * scale), round(x * scale)) for y, x in ((top, left), np.add((top, left), mask.shape))
    ]
    if scale > 1:
        mask = (cv2.resize(mask * 255, (x1 - x0, y1 - y0), interpolation=cv2.INTER_LINEAR) > 127).astype(np.uint8)
    region = canvas[y0:y1, x0:x1]
    mixed = (np.arange(256)[:, None] * 0.7 + np.array(colour) * 0.3).round().astype(np.uint8)
    cv2.copyTo(cv2.LUT(region, mixed[None]), mask, region)
    outlines, _ = cv2.findContours(mask, cv2.RETR_CCOMP, cv2.CHAIN_APPROX_SIMPLE)
    cv2.drawContours(canvas, outlines, -1, colour, thickness, cv2.LINE_AA, offset=(x0, y0))


@functools.cache
def _font(size: int) -> ImageFont.FreeTypeFont:
    """Matplotlib's DejaVu Sans, the system's, or where neither is installed Pillow's own font."""
    matplotlib = importlib.util.find_spec("matplotlib")
    folder = Path(matplotlib.origin).parent / "mpl-data" / "fonts" / "ttf" if matplotlib else Path()
    for file in (folder / FONT, FONT):
        try:
            return ImageFont.truetype(file, size)
        except OSError:
            pass
    return ImageFont.load_default(size)


def _render(name: str, rest: str, size: int, max_width: int) -> np.ndarray:
    """A label as [h, w] uint8, 255 where letters are, with a margin. Long names are shortened to ``max_width``."""
    name = " ".join(name.encode("utf-8", "replace").decode().split())
    font, margin, text = _font(size), max(2, size // 5), f"{name}{rest}".strip()
    for length in range(min(len(name), max_width) - 1, -1, -1):
        if font.getlength(text) + 2 * margin <= max_width:
            break
        text = f"{name[:length]}…{rest}"
    left, _, right, _ = map(math.ceil, font.getbbox(text))
    picture = Image.new("L", (right - min(left, 0) + 2 * margin, sum(font.getmetrics()) + margin))
    ImageDraw.Draw(picture).text((margin - min(left, 0), margin // 2), text, fill=255, font=font)
    return np.asarray(picture)


def _free_place(box: Sequence[int], w: int, h: int, width: int, height: int, taken: np.ndarray) -> tuple[int, int]:
    """Left and top of a label of ``w`` x ``h`` pixels beside its box, where it hides the others least."""
    x0, y0, x1, y1 = box
    places = [(x0, y0 - h), (x0, y0), (x0, y1), (x1 - w, y0 - h), (x1 - w, y1), (x1, y0)]
    places = [(x, y) for x, y in places if 0 <= y <= height - h] or [(x0, 0)]
    places = [(min(max(x, 0), width - w), y) for x, y in places]
    shared = [np.minimum(taken[:, 2:], (x + w, y + h)) - np.maximum(taken[:, :2], (x, y)) for x, y in places]
    return places[int(np.argmin([x.clip(0).prod(1).sum() for x in shared]))]


# ---- files


def read_image(file: str | os.PathLike) -> np.ndarray:
    """Any picture that Pillow reads, upright, as [H, W, 3] uint8, BGR; InputError where it is damaged."""
    turn = Image.Transpose
    turns = (None, None, turn.FLIP_LEFT_RIGHT, turn.ROTATE_180, turn.FLIP_TOP_BOTTOM)  # by EXIF orientation
    turns += (turn.TRANSPOSE, turn.ROTATE_270, turn.TRANSVERSE, turn.ROTATE_90)
    try:
        image = Image.open(file)
        image.load()
        try:
            turn = turns[image.getexif().get(0x0112, 1)]
        except Exception:  # the EXIF block of many a camera is malformed
            turn = None
        image = image if turn is None else image.transpose(turn)
        if image.mode == "F" or image.mode.startswith("I"):  # of more than 8 bits: 10, 12, 14 or 16
            values = np.nan_to_num(np.asarray(image, np.float64), posinf=0.0, neginf=0.0)
            scales = [1] * (image.mode == "F") + [255, 1023, 4095, 16383, 65535, values.max()]
            values = values.clip(0) * (255 / (next(x for x in scales if x >= values.max()) or 1))
            image = Image.fromarray(values.round().astype(np.uint8))
        image = image.convert("RGBA") if image.mode in ("P", "PA") else image
        return np.ascontiguousarray(np.asarray(image.convert("RGB"))[:, :, ::-1])
    except Exception as error:  # whatever Pillow raises, depending on the format and on the damage
        raise InputError(f"{file} cannot be read ({error or type(error).__name__}). Replace the file.") from error


def _kind(file: Path) -> str | None:
    """ "picture" or "video", or None for anything else."""
    no_pictures = ("BUFR", "EPS", "GRIB", "HDF5", "MPEG", "WMF")  # Pillow reads no more than their headers
    try:
        with Image.open(file) as image:
            known = image.format
    except Exception:
        known = Image.registered_extensions().get(file.suffix.lower())  # a damaged picture is named later
    if known in Image.OPEN and known not in no_pictures:
        return "picture"
    is_video = (mimetypes.guess_type(file.name)[0] or "").startswith("video/") and file.suffix.lower() != ".ts"
    return "video" if is_video else None


def find_files(inputs: Sequence[Path], output: Path) -> dict[Path, Path]:
    """Pictures and videos -> where their drawings go. Folders are searched; hidden files and ``output`` are not."""
    found: dict[Path, Path] = {}
    taken: set[str] = set()
    for path in inputs:
        files = [path]
        for place, folders, names in os.walk(path):  # of a file: nothing
            inner = sorted(x for x in folders if not x.startswith("."))
            folders[:] = [x for x in inner if Path(place, x).resolve() != output.resolve()]
            files += [Path(place, x) for x in sorted(names) if not x.startswith(".")]
        kinds = {x: _kind(x) for x in files if x.is_file()}
        if not any(kinds.values()):
            raise InputError(f"{path}: there is no picture and no video. Name another file or folder.")
        for file in (x for x in kinds if kinds[x] and x not in found):
            name = file.relative_to(path) if path.is_dir() else Path(file.name)
            suffix, number = ".mp4" if kinds[file] == "video" else ".png", 1
            found[file] = output / name.with_name(f"{name.stem}{suffix}")
            while str(found[file]).casefold() in taken:  # names that differ in case alone are one to some systems
                found[file] = output / name.with_name(f"{name.name}{'' if number == 1 else f'-{number}'}{suffix}")
                number += 1
            taken.add(str(found[file]).casefold())
    overwritten = {x.resolve() for x in found} & {x.resolve() for x in found.values()}
    if overwritten:
        raise InputError(f"{min(overwritten)} would be overwritten. Name another folder with --output.")
    return found


def process(detector: Detector, file: Path, target: Path, score_threshold: float) -> Iterator[dict]:
    """Draw a picture or a video, and give the entry of each picture or frame in detections.json."""
    if target.suffix == ".png":
        image = read_image(file)
        found = detector(image, score_threshold)
        drawing = draw(image, found, detector.class_names, LONG_SIDE)
        target.write_bytes(cv2.imencode(".png", drawing)[1])
        yield {"file_name": str(file), **describe(image, found, detector.class_names)}
        return
    video, writer, number = cv2.VideoCapture(str(file)), None, 0
    rate = video.get(cv2.CAP_PROP_FPS)
    while (image := video.read()[1]) is not None:
        found = detector(image, score_threshold)
        drawing = draw(image, found, detector.class_names)
        if writer is None:
            width, height = size = [x + x % 2 for x in drawing.shape[1::-1]]  # encoders take even sizes only
            codec = cv2.VideoWriter_fourcc(*"mp4v")
            writer = cv2.VideoWriter(str(target), codec, rate if 0 < rate <= 1000 else 25.0, size)
        if 0 <= height - drawing.shape[0] <= 1 and 0 <= width - drawing.shape[1] <= 1:
            missing = height - drawing.shape[0], width - drawing.shape[1]
            drawing = cv2.copyMakeBorder(drawing, 0, missing[0], 0, missing[1], cv2.BORDER_REPLICATE)
        else:  # a stream whose size changes
            drawing = cv2.resize(drawing, size, interpolation=cv2.INTER_AREA)
        writer.write(drawing)
        yield {"file_name": str(file), "frame": number, **describe(image, found, detector.class_names)}
        number += 1
    if writer is None:
        raise InputError(f"{file} is not a video that can be read. Convert it to mp4.")
    writer.release()


def describe(image: np.ndarray, found: dict[str, np.ndarray], class_names: Sequence[str]) -> dict:
    """What detections.json says of a picture, but for its file."""
    bboxes = np.concatenate((found["boxes"][:, :2], found["boxes"][:, 2:] - found["boxes"][:, :2]), axis=1)
    detections = []
    for c, bbox, score in zip(found["classes"].tolist(), bboxes.tolist(), found["scores"].tolist()):
        name = _name(c, class_names)
        detections.append({"category_name": name, "category_id": c, "bbox": bbox, "score": score})
    for detection, mask in zip(detections, found.get("masks", ())):
        detection["segmentation"] = encode_mask(mask)
    for detection, score in zip(detections, found.get("mask_scores", ())):
        detection["mask_score"] = float(score)
    return {"height": image.shape[0], "width": image.shape[1], "detections": detections}


def run(args: argparse.Namespace) -> None:
    if not 0 <= args.score_threshold <= 1:
        raise InputError(f"--score-threshold is {args.score_threshold}. Give a number from 0 to 1.")
    files = find_files(args.inputs, args.output)
    detector = Detector(args.model)
    entries, num_done, failures = [], 0, []
    try:
        args.output.mkdir(parents=True, exist_ok=True)
        try:
            for file, target in files.items():
                target.parent.mkdir(parents=True, exist_ok=True)
                try:
                    for entry in process(detector, file, target, args.score_threshold):
                        entries.append(entry)
                    num_done += 1
                except InputError as error:
                    failures.append(str(error))
        finally:  # Ctrl-C too: what is done is written
            (args.output / "detections.json").write_text(json.dumps(entries, indent=1) + "\n")
    except OSError as error:
        raise InputError(
            f"{error.filename or args.output} cannot be written ({error.strerror}). Name another --output."
        ) from error
    num_found = sum(len(x["detections"]) for x in entries)
    print(f"{num_done} of {len(files)} files done, {num_found} detections: {args.output / 'detections.json'}")
    if failures:
        raise InputError("\n".join(failures))


def main(argv: list[str] | None = None) -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", type=Path, help="model.onnx or model.xml, as tools/export.py wrote it")
    parser.add_argument("inputs", nargs="+", type=Path, metavar="INPUT", help="a picture, a video, or a folder of them")
    parser.add_argument("--output", required=True, type=Path, help="folder for the drawn pictures and detections.json")
    parser.add_argument("--score-threshold", type=float, default=0.3, help="least score to draw (%(default)s)")
    args = parser.parse_args(argv)
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # pictures of 100 megapixels are welcome
    try:
        run(args)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted", file=sys.stderr)
        sys.exit(130)


if __name__ == "__main__":
    main()
