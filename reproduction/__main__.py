#!/usr/bin/env python
"""Train the paper's ablations in miniature, measure them, and write a page of what holds.

    python -m reproduction full     # digits, three seeds: docs/reproduction.md        (make reproduce)
    python -m reproduction short    # K = 0 and 2, one seed: output/reproduction_short.md
    python -m reproduction more     # Co-DINO, and nuclei: a section of the same page   (make reproduce-more)

Interrupted, the same command goes on: finished runs stay as they are.
"""

import argparse
import json
import os
import sys
from pathlib import Path

# As train_net.py does.
os.environ.setdefault("GOMP_SPINCOUNT", "3000")

from codetr_d2.errors import InputError

from .measurements import MEASURED, draw_pictures, result_of
from .page import write_page
from .plans import DIGITS, PLANS, Run
from .results import Results
from .runs import run_all, run_command, train

ROOT = Path(__file__).resolve().parent.parent


def positive(text: str) -> int:
    if not text.isdecimal() or not int(text):
        raise argparse.ArgumentTypeError(f"{text!r} must be a whole number from 1 on")
    return int(text)


def prepare(runs: tuple[Run, ...]) -> None:
    """Write the datasets and the backbone's weights where they are missing."""
    commands = {run.setting.prepare for run in runs} | {
        ("tools/prepare/prepare_efficientnet.py", "datasets/weights/tf_efficientnet_lite0.pth")
    }
    for script, output in sorted(commands):
        if not Path(output).exists():
            log = Path("output") / f"{Path(script).stem}.out"
            log.parent.mkdir(exist_ok=True)
            run_command([script, "--output", output], log, threads=1)


def train_and_measure(run: Run, folder: Path) -> None:
    """All that a run needs, each step once."""
    train(run, folder, threads=1)
    if not (folder / MEASURED).is_file():
        command = ["-m", "reproduction.measurements", str(folder), *(["--branch"] if run.experiment.branch else [])]
        run_command(command, folder / "measurements.out", threads=1)


def main() -> None:
    parser = argparse.ArgumentParser(
        prog="python -m reproduction", description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("plan", choices=PLANS)
    parser.add_argument("--output", type=Path, help="folder of the runs (default: output/reproduction)")
    parser.add_argument(
        "--jobs", type=positive, default=os.cpu_count(), help="runs at a time, one thread each (%(default)s)"
    )
    args = parser.parse_args()
    output = args.output.expanduser().absolute() if args.output else Path("output/reproduction")
    os.chdir(ROOT)  # the paths in the configs are relative to it
    plan = PLANS[args.plan]
    folder = plan.page.with_suffix("")
    try:
        results = Results.read(folder / "results.json")
        prepare(plan.runs)
        run_all(plan.runs, lambda run: train_and_measure(run, output / run.name), args.jobs)
        results = results.updated([result_of(run, output / run.name) for run in plan.runs])
        results.write(folder / "results.json")
        costs_file = folder / "cost.json"
        if any(run.setting == DIGITS for run in plan.runs):
            costs = draw_pictures(plan.runs, output, results, folder)
            costs_file.write_text(json.dumps(costs, indent=1) + "\n")
        write_page(plan.page, results, json.loads(costs_file.read_text()) if costs_file.is_file() else [])
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    print(f"{plan.page} says what holds.")


if __name__ == "__main__":
    main()
