#!/usr/bin/env python
"""Export a model to a file that runs without PyTorch, and compare what it finds with what the model finds.

    python tools/export.py --config-file output/my_run/config.yaml --weights output/my_run/model_final.pth \
        --format onnx --output exported

The file takes any number of pictures of any size and gives their detections. It is compared with the model on pictures
of several sizes and, where the config's test dataset is there, by AP; where they differ, the command fails. KEY VALUE
pairs at the end change options of the config. docs/export.md says what is in the file and how to run it.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

# As train_net.py does.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

import codetr_d2  # noqa: F401 (registers the model)
from codetr_d2.config.config_file import load_config
from codetr_d2.errors import InputError
from codetr_d2.export.packages import check_packages

FORMATS = ("onnx", "openvino")  # and, by a flag, OpenVINO in int8


def parse_arguments(argv: Sequence[str] | None) -> argparse.Namespace:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--config-file", required=True, metavar="FILE", help="of the model")
    parser.add_argument("--weights", help="checkpoint (default: MODEL.WEIGHTS of the config)")
    parser.add_argument("--format", required=True, choices=FORMATS, help="what to write")
    parser.add_argument("--output", required=True, type=Path, metavar="DIR", help="folder for the files")
    parser.add_argument(
        "--int8",
        action="store_true",
        help="with --format openvino: also model_int8.xml, with the layers in float32 that AP on the test set needs",
    )
    parser.add_argument(
        "--postprocess",
        default="auto",
        choices=("auto", "soft-nms", "top-k", "none"),
        help="what follows the decoder inside the file; none: logits and boxes of all queries (default: as the config)",
    )
    parser.add_argument(
        "--pictures",
        nargs="+",
        default=[],
        type=Path,
        metavar="PATH",
        help="pictures or folders of them to compare on (default: some of the test dataset)",
    )
    parser.add_argument("opts", nargs=argparse.REMAINDER, metavar="KEY VALUE", help="config options to change")
    return parser.parse_args(argv)


def run(args: argparse.Namespace) -> None:
    if args.int8 and (args.format != "openvino" or args.postprocess == "none"):
        raise InputError("--int8 goes with --format openvino, and with detections to measure AP by")
    check_packages("int8" if args.int8 else args.format)
    from codetr_d2.export.export import check_exported, export_int8, export_onnx, load_model, registered

    cfg = load_config(args.config_file, args.opts)
    if args.weights:
        cfg.MODEL.WEIGHTS = os.path.expanduser(args.weights)
    cfg = registered(cfg)
    model = load_model(cfg)
    output = args.output.expanduser()
    print("Exporting takes a minute or two ...", flush=True)
    file = export_onnx(cfg, model, output, args.config_file, args.postprocess)
    if args.format == "openvino":
        from codetr_d2.export.openvino import write_openvino

        onnx_file, file = file, write_openvino(file, output)
        for part in output.glob(f"{onnx_file.name}*"):  # the weights of large models lie beside it
            part.unlink()
    if args.postprocess == "none":
        print(f"{file} gives logits and boxes, which are not compared.")
    else:
        check_exported(cfg, model, file, args.pictures)
    files = [file]
    if args.int8:
        files.append(export_int8(cfg, model, file))
    for file in files:
        size = sum(part.stat().st_size for part in output.glob(f"{file.stem}.*"))
        print(f"{file}: {size / 1e6:.0f} MB")


def main(argv: Sequence[str] | None = None) -> None:
    try:
        run(parse_arguments(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
