"""``python -m benchmarks loop``: iterations of train_net.py, and what of them is not forward and backward."""

import argparse
import statistics
import tempfile
import time
from collections.abc import Callable
from contextlib import ExitStack
from pathlib import Path
from unittest import mock

import torch
from detectron2.config import CfgNode

from codetr_d2.engine import CoDETRTrainer, ModelEMA, check_config, load_config, setup
from codetr_d2.engine import trainer as trainer_module
from codetr_d2.engine.trainer import StepTrainer
from codetr_d2.modeling.assigners.hungarian import HungarianMatcher

from .machine import Stopwatch, describe_machine, finisher
from .report import machine_line, plot_bars, print_table, save

__all__ = ["benchmark_loop"]

WARM_UP = 10  # iterations
FORWARD, BACKWARD, MATCHING, HOOKS = "forward", "backward", "matching", "hooks and log"


class _TimedTrainer(CoDETRTrainer):
    """Trains for a while and keeps the seconds of each iteration and of its parts."""

    def __init__(self, cfg: CfgNode, iterations: int):
        super().__init__(cfg)
        self.max_iter = WARM_UP + iterations + 1  # the last one, not timed either, saves a checkpoint
        self.finish = finisher(cfg.MODEL.DEVICE)
        self.watch = Stopwatch()
        self.timed_iterations: list[dict[str, float]] = []

    def timed(self, name: str, function: Callable) -> Callable:
        """The function, timed until the device has done its part."""

        def finished(*args, **kwargs):
            result = function(*args, **kwargs)
            self.finish()
            return result

        return self.watch.timed(name, finished)

    def train(self) -> None:
        places = {
            FORWARD: (StepTrainer, "_losses"),
            BACKWARD: (torch.Tensor, "backward"),
            MATCHING: (HungarianMatcher, "match"),
            "clipping": (trainer_module, "clip_full_model"),
            "optimizer": (self.optimizer, "step"),
            "EMA": (ModelEMA, "update"),
            HOOKS: (StepTrainer, "_write_step"),
        }
        with ExitStack() as stack:
            for name, (owner, attribute) in places.items():
                timed = self.timed(name, getattr(owner, attribute))
                stack.enter_context(mock.patch.object(owner, attribute, timed))
            super().train()

    def before_step(self) -> None:
        self.watch.seconds.clear()
        self.start = time.perf_counter()
        super().before_step()
        self.watch.seconds[HOOKS] = time.perf_counter() - self.start

    def after_step(self) -> None:
        start = time.perf_counter()
        super().after_step()
        end = time.perf_counter()
        parts = dict(self.watch.seconds)
        parts[HOOKS] += end - start
        parts[FORWARD] -= parts[MATCHING]  # which is in it
        parts["data"] = self.storage.history("data_time").latest()
        parts["rest"] = end - self.start - sum(parts.values())
        if WARM_UP <= self.iter < self.max_iter - 1:
            self.timed_iterations.append(parts)


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
        trainer = _TimedTrainer(setup(cfg), args.iterations)
        machine = describe_machine(trainer.cfg.MODEL.DEVICE, args.threads)
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
