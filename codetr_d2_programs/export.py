"""Export a model to a file that runs without PyTorch, and compare what it finds with what the model finds.

    codetr_d2 export --config-file output/my_run/config.yaml --weights output/my_run/model_final.pth \
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

import codetr_d2  # noqa: F401 (registers the model)
from codetr_d2.config.config_file import load_config
from codetr_d2.errors import InputError
from codetr_d2.export.packages import check_packages

FORMATS = ("onnx", "openvino", "torch")


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
        "--compile", action="store_true", help="with --format torch: also compiled ahead of time for this machine"
    )
    parser.add_argument(
        "--size",
        nargs=2,
        type=int,
        metavar=("HEIGHT", "WIDTH"),
        help="with --format torch, for Swin: the one size in pixels that pictures are padded to",
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
    if args.format != "torch" and (args.compile or args.size):
        raise InputError("--compile and --size go with --format torch")
    if args.format == "torch" and args.postprocess not in ("auto", "top-k"):
        raise InputError(f"--postprocess {args.postprocess} is not for --format torch, whose detections are the top k")
    check_packages("int8" if args.int8 else args.format)
    from codetr_d2.export import export

    cfg = load_config(args.config_file, args.opts)
    if args.weights:
        cfg.MODEL.WEIGHTS = os.path.expanduser(args.weights)
    cfg = export.registered(cfg)
    model = export.load_model(cfg)
    output = args.output.expanduser()
    print("Exporting takes a minute or two ...", flush=True)
    if args.format == "torch":
        size = tuple(args.size) if args.size else None
        files = export.export_torch(cfg, model, output, args.config_file, args.pictures, args.compile, size)
    else:
        files = [export.export_onnx(cfg, model, output, args.config_file, args.postprocess)]
        if args.format == "openvino":
            files = [export.onnx_to_openvino(files[0])]
        if args.postprocess == "none":
            print(f"{files[0]} gives logits and boxes, which are not compared.")
        else:
            export.check_exported(cfg, model, files[0], args.pictures)
        if args.int8:
            files.append(export.export_int8(cfg, model, files[0]))
    for file in files:
        parts = [file, file.with_suffix(".bin"), file.with_name(f"{file.name}.data")]
        print(f"{file}: {sum(part.stat().st_size for part in parts if part.is_file()) / 1e6:.0f} MB")


def main(argv: Sequence[str] | None = None) -> None:
    try:
        run(parse_arguments(argv))
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)


if __name__ == "__main__":
    main()
