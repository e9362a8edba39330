#!/usr/bin/env python
"""Measure the project's speed and memory: medians of alternating runs, on a machine that does nothing else.

python -m benchmarks op --threads 2 --output op.json     # deformable attention: compiled kernels and eager code
python -m benchmarks op --device cuda --dtype bfloat16   # the same on a GPU: Triton's kernels
python -m benchmarks inference --config-file configs/... --sizes 800x1333 --against hf
python -m benchmarks train --config-file configs/... --sizes 480x640 --against eager+separate-passes
python -m benchmarks train --config-file configs/... --sweep k=0,1,2,3,6 --output k.json   # and k.png
python -m benchmarks parts --config-file configs/... --sizes 800x1333   # the roofline
python -m benchmarks loader --config-file configs/...
python -m benchmarks annotations   # reading an annotation file of COCO's size, and detectron2's own reader
python -m benchmarks evaluation    # COCO's evaluation, and pycocotools
python -m benchmarks loop --config-file configs/...   # train_net.py's iterations: what is not forward and backward
"""

import argparse
import os
from collections.abc import Sequence
from pathlib import Path

# As train_net.py does.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch

from codetr_d2.errors import InputError

from .annotations import benchmark_annotations, benchmark_evaluation
from .loader import benchmark_loader
from .loop import benchmark_loop
from .model import SWEEPS, benchmark_model
from .op import AGAINST, SIZES, benchmark_op
from .parts import benchmark_parts


def positive(text: str) -> int:
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def natural(text: str) -> int:
    number = int(text)
    if number < 0:
        raise argparse.ArgumentTypeError(f"must not be negative, got {number}")
    return number


def size_names(text: str) -> list[str]:
    names = text.split(",")
    for name in names:
        if name not in SIZES:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SIZES)}")
    return names


def image_sizes(text: str) -> list[tuple[int, int]]:
    sizes = []
    for part in text.split(","):
        height, _, width = part.partition("x")
        if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
            raise argparse.ArgumentTypeError(f"{part!r} is no size; write height x width in pixels, like 800x1333")
        sizes.append((int(height), int(width)))
    return sizes


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")

    def add(name: str, summary: str) -> argparse.ArgumentParser:
        command = commands.add_parser(name, help=summary, description=summary)
        command.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="CPU threads")
        command.add_argument("--output", type=Path, help="write all that was measured to this JSON file, and a PNG")
        return command

    op = add("op", "the deformable attention operator, forward and backward")
    op.add_argument("--against", choices=AGAINST, default="eager", help="what the fastest backend is compared with")
    op.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda compares Triton's kernels")
    dtypes = ("float32", "bfloat16", "float16", "float64")
    op.add_argument("--dtype", choices=dtypes, default="float32", help="of the values")
    op.add_argument("--sizes", type=size_names, default=["encoder-4"], help="comma-separated: " + ", ".join(SIZES))
    op.add_argument("--repeat", type=positive, default=5, help="timed runs of each backend and pass")
    op.set_defaults(run=benchmark_op)

    def add_model(name: str, summary: str) -> argparse.ArgumentParser:
        command = add(name, summary)
        command.add_argument("--config-file", required=True)
        command.add_argument("--device", choices=("cpu", "cuda"), default="cpu")
        command.add_argument("--dtype", choices=("float32", "bfloat16"), default="float32")
        command.add_argument("--sizes", type=image_sizes, default=[(800, 1333)], help="height x width, comma-separated")
        command.add_argument("--batch", type=positive, default=1, help="images")
        command.add_argument("--backend", choices=("auto", "eager", "cpp", "triton"), help="MODEL.MS_DEFORM_ATTN")
        command.add_argument("--repeat", type=positive, default=5, help="timed runs")
        command.add_argument(
            "opts", nargs=argparse.REMAINDER, help="options of the config, KEY VALUE; MODEL.WEIGHTS, or random ones"
        )
        return command

    def add_comparison(name: str, summary: str) -> argparse.ArgumentParser:
        command = add_model(name, summary)
        command.add_argument(
            "--against", default="nothing", help="what is measured in turn; changes joined by +, sides by commas"
        )
        command.add_argument(
            "--sweep", help=f"like size=256,512,800 (squares) or head=atss,roi; one of: {', '.join(SWEEPS)}"
        )
        return command

    inference = add_comparison("inference", "images to detections")
    inference.set_defaults(objects=0, run=lambda args: benchmark_model(args, training=False))
    train = add_comparison("train", "a training step: losses, gradients, clipping, update")
    train.add_argument("--objects", type=natural, default=20, help="in each image")
    train.set_defaults(run=lambda args: benchmark_model(args, training=True))

    parts = add_model("parts", "seconds, flops and bytes of each part of the model, and shares of this machine's peaks")
    parts.add_argument("--train", action="store_true", help="of a training step, in place of inference")
    parts.add_argument("--objects", type=natural, default=20, help="in each image, with --train")
    parts.set_defaults(run=benchmark_parts)

    loader = add("loader", "images a second of the training data: the mapper alone, and the loader")
    loader.add_argument("--config-file", required=True)
    loader.add_argument("--objects", type=natural, default=8, help="in each image, with polygons as masks")
    loader.add_argument("--images", type=positive, default=64, help="images to time")
    loader.add_argument("--files", type=positive, default=16, help="JPEG files of 640 x 480 pixels to read them from")
    loader.add_argument("opts", nargs=argparse.REMAINDER, help="options of the config, KEY VALUE")
    loader.set_defaults(run=benchmark_loader)

    annotations = add("annotations", "reading and checking an annotation file, in turn with detectron2's reader")
    annotations.add_argument("--images", type=positive, default=118_287)
    annotations.add_argument("--objects", type=positive, default=661_675, help="in all images together")
    annotations.add_argument("--repeat", type=positive, default=5, help="timed runs of each side")
    annotations.set_defaults(run=benchmark_annotations)

    evaluation = add("evaluation", "COCO's average precision of boxes, in turn with pycocotools")
    evaluation.add_argument("--images", type=positive, default=5000)
    evaluation.add_argument("--objects", type=positive, default=36_335, help="in all images together")
    evaluation.add_argument("--detections", type=positive, default=300, help="in each image")
    evaluation.add_argument("--repeat", type=positive, default=3, help="timed runs of each side")
    evaluation.set_defaults(run=benchmark_evaluation)

    loop = add("loop", "where the time of training goes outside of forward and backward, with the config's own dataset")
    loop.add_argument("--config-file", required=True)
    loop.add_argument("--iterations", type=positive, default=100, help="to time, after ten to warm up")
    loop.add_argument("opts", nargs=argparse.REMAINDER, help="options of the config, KEY VALUE")
    loop.set_defaults(run=benchmark_loop)
    return parser


def main(argv: Sequence[str] | None = None) -> None:
    parser = build_parser()
    args = parser.parse_args(argv)
    if args.output is not None and not args.output.absolute().parent.is_dir():
        parser.error(f"--output {args.output}: its folder does not exist")
    try:
        args.run(args)
    except InputError as error:
        parser.exit(2, f"error: {error}\n")


if __name__ == "__main__":
    main()
