"""``python -m benchmarks loop``: iterations of train_net.py, and what of them is not forward and backward."""

import argparse
import statistics
import tempfile
from pathlib import Path

import torch
from detectron2.config import CfgNode

from codetr_d2.engine import CoDETRTrainer, check_config, load_config, setup
from codetr_d2.ops import keep_freed_memory

from .machine import Stopwatch, describe_machine, finisher
from .report import machine_line, plot_bars, print_table, save

__all__ = ["benchmark_loop"]

WARM_UP = 10  # iterations
FORWARD, BACKWARD, OPTIMIZER, HOOKS = "forward", "backward", "optimizer", "hooks"


class _TimedTrainer(CoDETRTrainer):
    """Trains for a while and keeps the seconds of each iteration and of its parts, which follow each other."""

    def __init__(self, cfg: CfgNode, iterations: int):
        super().__init__(cfg)
        self.max_iter = WARM_UP + iterations + 1  # the last one, not timed either, saves a checkpoint
        self.timed_iterations: list[dict[str, float]] = []
        self.watch = watch = Stopwatch(finisher(cfg.MODEL.DEVICE))
        self.bare_model.register_forward_pre_hook(lambda *_: watch.lap("data"))
        self.bare_model.register_forward_hook(lambda *_: watch.lap(FORWARD))
        trained = [p for p in self.bare_model.parameters() if p.requires_grad]
        torch.autograd.graph.register_multi_grad_hook(trained, lambda _: watch.lap(BACKWARD))
        self.optimizer.register_step_pre_hook(lambda *_: watch.lap("clipping and loss values"))
        self.optimizer.register_step_post_hook(lambda *_: watch.lap(OPTIMIZER))

    def before_step(self) -> None:
        self.watch.restart()
        super().before_step()
        self.watch.lap(HOOKS)

    def after_step(self) -> None:
        self.watch.lap("EMA" if self.ema else OPTIMIZER)
        super().after_step()
        self.watch.lap(HOOKS)
        if WARM_UP <= self.iter < self.max_iter - 1:
            self.timed_iterations.append(self.watch.seconds)


def benchmark_loop(args: argparse.Namespace) -> None:
    """The command ``loop``."""
    torch.set_num_threads(args.threads)
    cfg = load_config(args.config_file, args.opts)
    if "MODEL.WEIGHTS" not in args.opts[::2]:
        cfg.MODEL.WEIGHTS = ""
    cfg.DATASETS.TEST = ()  # an evaluation is no part of an iteration
    check_config(cfg)
    with tempfile.TemporaryDirectory() as folder:
        cfg.OUTPUT_DIR = folder
        cfg = setup(cfg)
        if cfg.MODEL.DEVICE == "cpu":
            keep_freed_memory()
        trainer = _TimedTrainer(cfg, args.iterations)
        machine = describe_machine(cfg.MODEL.DEVICE, args.threads)
        trainer.resume_or_load(resume=False)
        trainer.train()
    measured = trainer.timed_iterations
    totals = {part: sum(x[part] for x in measured) for part in measured[0]}
    whole = sum(totals.values())
    outside = whole - totals[FORWARD] - totals[BACKWARD]
    name = Path(args.config_file).stem
    print(f"\n{name}, {len(measured)} iterations; {machine_line(machine)}\n")
    milliseconds = {part: 1000 * statistics.median(x[part] for x in measured) for part in totals}
    rows = [
        {"part": part, "median, ms": f"{value:.2f}", "share of all time": f"{totals[part] / whole:.2%}"}
        for part, value in milliseconds.items()
    ]
    rows.append({"part": "all", "median, ms": f"{1000 * statistics.median(sum(x.values()) for x in measured):.2f}"})
    rows.append({"part": "all but forward and backward", "share of all time": f"{outside / whole:.2%}"})
    print_table(rows)
    if args.output:
        report = {
            "command": "loop",
            "config": name,
            "options": args.opts,
            "machine": machine,
            "outside_share": outside / whole,
            "iterations": measured,
        }
        save(report, plot_bars(name, {"milliseconds an iteration": {"median": milliseconds}}), args.output)
