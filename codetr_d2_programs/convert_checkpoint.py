"""Convert a published Co-DETR checkpoint into one of this project, and back.

    codetr_d2 convert-checkpoint co_dino_5scale_swin_large_1x_coco.pth weights/co_dino_swin_large.pth
    codetr_d2 convert-checkpoint --to-published weights/co_dino_swin_large.pth published.pth

Training and evaluation read published files as they are; a converted one serves programs that read Detectron2's layout
only. The way back gives the file that was converted, or the published names of a model that was trained here.
"""

import argparse
import os
import sys
from collections.abc import Sequence

import torch

from codetr_d2.checkpoint.checkpointer import atomic_write, check_writable
from codetr_d2.checkpoint.convert import checkpoint_to_codetr, checkpoint_to_published
from codetr_d2.checkpoint.finite import check_finite
from codetr_d2.checkpoint.published import describe
from codetr_d2.checkpoint.safe_load import load_torch
from codetr_d2.engine import load_config
from codetr_d2.errors import InputError


def build_parser() -> argparse.ArgumentParser:
    parser = argparse.ArgumentParser(
        description=__doc__.split("\n\n")[0], epilog=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("input", metavar="INPUT", help="the checkpoint to read")
    parser.add_argument("output", metavar="OUTPUT", help="the checkpoint to write")
    parser.add_argument("--to-published", action="store_true", help="from this project's layout to the published one")
    parser.add_argument(
        "--config-file", help="config of a model with an EVA-02 backbone that was trained here, for --to-published"
    )
    parser.add_argument("--overwrite", action="store_true", help="replace OUTPUT where it exists")
    return parser


def convert(args: argparse.Namespace) -> None:
    if not os.path.isfile(args.input):
        raise InputError(f"{args.input}: no such checkpoint; name the file to convert")
    folder = os.path.dirname(args.output) or "."
    if os.path.isdir(args.output):
        raise InputError(f"{args.output} is a folder; name the file to write")
    if os.path.exists(args.output) and not args.overwrite:
        raise InputError(f"{args.output} exists; choose another name, or replace it with --overwrite")
    if not os.path.isdir(folder):
        raise InputError(f"{args.output}: there is no folder {folder}; make it first")
    check_writable(folder)
    cfg = load_config(args.config_file, []) if args.config_file else None
    data, dropped = load_torch(args.input)
    unused = {}
    try:
        if args.to_published:
            result = checkpoint_to_published(data, cfg)
        else:
            result, unused = checkpoint_to_codetr(data)
    except InputError as error:
        raise InputError(f"{args.input} {error}") from None
    weights = result.get("model", result.get("state_dict", result))
    check_finite(args.input, weights)
    atomic_write(args.output, lambda file: torch.save(result, file))

    print(f"{args.output}: {len(weights)} tensors")
    if unused:
        print("Without a place in the model, and kept for the way back:")
        print("\n".join(f"  {line}" for line in describe(unused)))
    if dropped:
        print("Left out, because it is no tensor and no plain value:")
        print("\n".join(f"  {name}" for name in dropped))


def main(argv: Sequence[str] | None = None) -> None:
    try:
        convert(build_parser().parse_args(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; nothing was written", file=sys.stderr)
        sys.exit(130)
