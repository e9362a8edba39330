#!/usr/bin/env python
"""Measure on trained models what the paper measures, and draw it.

    python tools/analyze.py discriminability --output found \
        --model ATSS=output/atss/config.yaml,output/atss/model_final.pth --model plain=output/plain/config.yaml

Several models come side by side into one picture. CONFIG without WEIGHTS takes MODEL.WEIGHTS of the config. Images are
the first ones of the config's first test dataset. KEY VALUE pairs at the end change options of every config.
docs/analysis.md says what each measurement is.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# As train_net.py does.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import torch
from tabulate import tabulate

import codetr_d2  # noqa: F401 (registers the model)
from codetr_d2.analysis.attention import measure_attention
from codetr_d2.analysis.discriminability import measure_discriminability
from codetr_d2.analysis.models import ModelSpec, load_models
from codetr_d2.analysis.queries import measure_queries
from codetr_d2.errors import InputError, named_disk_problems

# By name what it is, and a function (models, number of images, output folder) -> rows of a table.
MEASUREMENTS = {
    "discriminability": ("feature norms against objects, before and after the encoder", measure_discriminability),
    "attention": ("the decoder's cross-attention against objects, and where queries look", measure_attention),
    "queries": ("customised queries: where they are, and how far from the original ones", measure_queries),
}


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    measurements = parser.add_subparsers(dest="measurement", required=True, metavar="NAME")
    for name, (what, measure) in MEASUREMENTS.items():
        sub = measurements.add_parser(name, help=what, description=what)
        sub.set_defaults(measure=measure)
        sub.add_argument(
            "--model",
            action="append",
            required=True,
            metavar="NAME=CONFIG[,WEIGHTS]",
            help="what pictures call the model, its config file and its weights; may be given several times",
        )
        sub.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for pictures and numbers")
        sub.add_argument("--images", type=int, default=100, metavar="N", help="how many images (default: %(default)s)")
        sub.add_argument("--device", choices=("cpu", "cuda"), help="default: a GPU where there is one")
        sub.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="options of every config")
    return parser.parse_args(argv)


def main(argv: Sequence[str] | None = None) -> None:
    args = parse_arguments(argv)
    try:
        if args.images < 1:
            raise InputError(f"--images {args.images}: it must be at least 1")
        if args.device == "cuda" and not torch.cuda.is_available():
            raise InputError("--device cuda: there is no GPU; leave the option out to run on the CPU")
        opts = [*args.opts, "MODEL.DEVICE", args.device] if args.device else args.opts
        models = load_models([ModelSpec.parse(text) for text in args.model], opts)
        output = args.output.expanduser()
        with named_disk_problems(str(output)):
            output.mkdir(parents=True, exist_ok=True)
        rows = args.measure(models, args.images, output)
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(tabulate(rows, headers="keys", tablefmt="github", floatfmt=".4f"))
    print(f"Pictures and numbers: {output}")


if __name__ == "__main__":
    main()
