"""Measure on trained models what the paper measures, and draw it.

    codetr_d2 analyze discriminability --output found \
        --model ATSS=output/atss/config.yaml,output/atss/model_final.pth \
        --model plain=output/plain/config.yaml,output/plain/model_final.pth

Several models come side by side into one picture. CONFIG without WEIGHTS takes MODEL.WEIGHTS of the config. Images are
the first ones of the config's first test dataset. KEY VALUE pairs at the end change options of every config.
docs/analysis.md says what each measurement is.
"""

import argparse
import sys
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path

import torch
from tabulate import tabulate

import codetr_d2  # noqa: F401 (registers the model)
from codetr_d2.analysis.attention import measure_attention
from codetr_d2.analysis.branches import measure_branches
from codetr_d2.analysis.conflict import measure_conflict
from codetr_d2.analysis.cost import compare_costs
from codetr_d2.analysis.discriminability import measure_discriminability
from codetr_d2.analysis.models import ModelSpec, load_models
from codetr_d2.analysis.queries import measure_queries
from codetr_d2.analysis.stability import compare_stability
from codetr_d2.errors import InputError, named_disk_problems

# By name what it is, and a function (models, number of images, output folder) -> rows of a table.
MEASUREMENTS = {
    "branches": (
        "average precision of the detector and of each auxiliary head, with and without NMS",
        measure_branches,
    ),
    "conflict": ("how far apart the heads look on the encoder's output", measure_conflict),
    "discriminability": ("feature norms against objects, before and after the encoder", measure_discriminability),
    "attention": ("the decoder's cross-attention against objects, and where queries look", measure_attention),
    "queries": ("customised queries: where they are, and how far from the original ones", measure_queries),
}


def image_size(text: str) -> tuple[int, int]:
    height, _, width = text.partition("x")
    if not (height.isdecimal() and width.isdecimal() and int(height) and int(width)):
        raise argparse.ArgumentTypeError(f"{text!r} is no size; write height x width in pixels, like 800x1333")
    return int(height), int(width)


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measurements = parser.add_subparsers(dest="measurement", required=True, metavar="NAME")

    def add(name: str, what: str) -> argparse.ArgumentParser:
        sub = measurements.add_parser(name, help=what, description=what)
        sub.add_argument(
            "--model",
            action="append",
            required=True,
            metavar="NAME=CONFIG[,WEIGHTS]",
            help="what pictures call the model, its config file and its weights; may be given several times",
        )
        sub.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for pictures and numbers")
        sub.set_defaults(floatfmt=".4f")
        sub.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
        return sub

    for name, (what, measure) in MEASUREMENTS.items():
        sub = add(name, what)
        sub.add_argument(
            "--images", type=positive, default=100, metavar="N", help="how many images (default: %(default)s)"
        )
        sub.set_defaults(measure=partial(measure_on_images, measure))
    cost = add("cost", "parameters, FLOPs, activations and time, by module; without weights and data")
    cost.add_argument("--size", type=image_size, default=(800, 1333), metavar="HxW", help="pixels (default: 800x1333)")
    cost.add_argument("--repeat", type=positive, default=5, metavar="N", help="timed runs (default: %(default)s)")
    cost.add_argument(
        "--depth", type=positive, default=2, metavar="N", help="of the modules in the table (default: %(default)s)"
    )
    cost.set_defaults(measure=measure_costs, floatfmt=".2f")
    stability = add("stability", "how much the matching changes in training; here --model is NAME=OUTPUT_DIR")
    stability.set_defaults(measure=lambda args, specs, opts: compare_stability(specs, args.output))
    for sub in measurements.choices.values():
        sub.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="options of every config")
    return parser.parse_args(argv)


def measure_on_images(measure: Callable, args: argparse.Namespace, specs: list[ModelSpec], opts: list[str]) -> list:
    return measure(load_models(specs, opts), args.images, args.output)


def measure_costs(args: argparse.Namespace, specs: list[ModelSpec], opts: list[str]) -> list:
    return compare_costs(specs, opts, args.size, args.repeat, args.depth, args.output)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        if args.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: there is no GPU; leave the option out to run on the CPU")
        opts = [*args.opts, "MODEL.DEVICE", args.device] if args.device else args.opts
        specs = [ModelSpec.parse(text) for text in args.model]
        args.output = args.output.expanduser()
        with named_disk_problems(str(args.output)):
            args.output.mkdir(parents=True, exist_ok=True)
        rows = args.measure(args, specs, opts)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=args.floatfmt))
    print(f"Pictures and numbers: {args.output}")
