"""Train or evaluate a model that a config file describes.

    codetr_d2 train --config-file CONFIG OUTPUT_DIR output/run
    codetr_d2 train --config-file CONFIG --num-gpus 8 OUTPUT_DIR output/run
    codetr_d2 train --config-file CONFIG --num-processes 2 MODEL.DEVICE cpu OUTPUT_DIR output/run
    codetr_d2 evaluate --config-file CONFIG MODEL.WEIGHTS output/run/model_final.pth

CONFIG is a file, or a name of the model zoo like co_dino/co_dino_5scale_r50_1x_coco.yaml. "evaluate" is "train
--eval-only". In the project's folder "python train_net.py" does the same. Without a GPU everything runs on the CPU,
there with --num-processes instead of --num-gpus.
"""

import argparse
import sys
import warnings
from collections.abc import Sequence

# First, as it names the command that mends a missing installation.
from codetr_d2.config.config_file import resolve_device
from codetr_d2.engine import (
    Terminated,
    check_config,
    check_output_dir,
    evaluate,
    load_config,
    run_processes,
    setup,
    train,
)
from codetr_d2.errors import InputError
from codetr_d2.ops import keep_freed_memory

# isort: split
import torch
from detectron2.config import CfgNode
from detectron2.engine import DefaultTrainer, default_argument_parser
from PIL import Image


def build_parser() -> argparse.ArgumentParser:
    parser = default_argument_parser(epilog=__doc__)
    parser.add_argument("--num-processes", type=int, default=1, help="number of processes on the CPU *per machine*")
    parser.set_defaults(dist_url="auto")
    return parser


def check_processes(args: argparse.Namespace, device: str) -> int:
    """The number of processes on this machine."""
    if min(args.num_gpus, args.num_processes, args.num_machines) < 1:
        raise InputError("--num-gpus, --num-processes and --num-machines must be at least 1")
    if device == "cpu" and args.num_gpus > 1:
        raise InputError(f"--num-gpus {args.num_gpus}: this runs on the CPU; use --num-processes {args.num_gpus}")
    if device != "cpu" and args.num_processes > 1:
        raise InputError("--num-processes is for the CPU (MODEL.DEVICE cpu); use --num-gpus")
    if device != "cpu" and args.num_gpus > torch.cuda.device_count():
        raise InputError(f"--num-gpus {args.num_gpus}: there are {torch.cuda.device_count()}")
    if args.num_machines > 1 and args.dist_url == "auto":
        raise InputError("--num-machines needs --dist-url, the address of the first machine, like tcp://10.0.0.1:50000")
    return args.num_processes if device == "cpu" else args.num_gpus


def run_job(cfg: CfgNode, args: argparse.Namespace) -> None:
    """The work of one process."""
    if resolve_device(cfg) == "cpu":
        keep_freed_memory()
    cfg = setup(cfg, args.eval_only)
    if args.eval_only:
        evaluate(cfg, args.resume)
    else:
        train(cfg, args.resume)


def main(argv: Sequence[str] | None = None) -> None:
    warnings.simplefilter("ignore", Image.DecompressionBombWarning)  # pictures of 100 megapixels are welcome
    args = build_parser().parse_args(argv)
    try:
        if not args.config_file:
            raise InputError("--config-file is missing; give a file, or a name that MODEL_ZOO.md lists")
        cfg = load_config(args.config_file, args.opts)
        device = resolve_device(cfg)
        num_processes = check_processes(args, device)
        cfg = DefaultTrainer.auto_scale_workers(cfg, num_processes * args.num_machines)
        check_config(cfg, num_processes * args.num_machines, args.resume, args.eval_only)
        check_output_dir(cfg, args.resume, args.eval_only)
        run_processes(
            run_job,
            num_processes,
            device=device,
            num_machines=args.num_machines,
            machine_rank=args.machine_rank,
            dist_url=args.dist_url,
            args=(cfg, args),
        )
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt as error:
        terminated = isinstance(error, Terminated)
        what = "terminated" if terminated else "interrupted"
        print(f"{what}; --resume goes on from the last checkpoint, if there is one", file=sys.stderr)
        sys.exit(143 if terminated else 130)
