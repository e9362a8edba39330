"""Train the runs of a plan, several at a time, and go on where an earlier attempt ended."""

import json
import os
import shlex
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor, as_completed
from pathlib import Path

from tqdm import tqdm

from codetr_d2.engine.metrics_file import is_finished
from codetr_d2.errors import InputError

from .plans import Run

__all__ = ["run_all", "run_command", "train"]

DESCRIPTION = "run.json"  # in a run's folder: what it was started with


def train(run: Run, folder: Path, threads: int) -> None:
    """Train a run, or go on with it, in a process of its own; return at once where it is finished.

    Args:
        run: what to train.
        folder: its output folder; ``log.txt`` is in there.
        threads: of the process.

    Raises:
        InputError: the folder holds a training with other options, or the training failed.
    """
    description = json.dumps({"config_file": run.setting.config_file, "opts": run.opts})
    file = folder / DESCRIPTION
    is_begun = (folder / "config.yaml").exists()
    if is_begun and not (file.is_file() and file.read_text() == description):
        raise InputError(
            f"{folder} holds a training with other options than the plan has now; remove it, or choose another --output"
        )
    if is_finished(folder):
        return
    command = ["train_net.py", "--config-file", run.setting.config_file]
    command += ["--resume"] if is_begun else []
    folder.mkdir(parents=True, exist_ok=True)
    file.write_text(description)
    run_command([*command, *map(str, run.opts), "OUTPUT_DIR", str(folder)], folder / "train.out", threads)


def run_command(arguments: Sequence[str], log: Path, threads: int) -> None:
    """Run Python with ``arguments``; what it prints is added to ``log``.

    Raises:
        InputError: it failed.
    """
    with open(log, "a") as file:
        print(f"$ python {shlex.join(arguments)}", file=file, flush=True)
        # In a file, progress bars are thousands of lines.
        environment = {**os.environ, "OMP_NUM_THREADS": str(threads), "TQDM_DISABLE": "1"}
        code = subprocess.run(
            [sys.executable, *arguments], stdout=file, stderr=subprocess.STDOUT, env=environment
        ).returncode
    if code:
        raise InputError(f"a run failed (exit code {code}): {log} says why. Mend that, and run this again to go on.")


def run_all(runs: Sequence[Run], work: Callable[[Run], None], jobs: int) -> None:
    """Do the work of all runs, ``jobs`` at a time, with a progress bar.

    Raises:
        InputError: of a run that failed; those that were under way are finished first, no other is begun.
    """
    start = time.monotonic()
    with ThreadPoolExecutor(jobs) as pool, tqdm(total=len(runs), unit="run") as bar:
        futures = {pool.submit(work, run): run for run in runs}
        try:
            for future in as_completed(futures):
                future.result()
                bar.update()
                minutes = (time.monotonic() - start) / 60
                bar.write(f"{futures[future].name}: done after {minutes:.1f} minutes", file=sys.stdout)
        except BaseException:
            pool.shutdown(wait=False, cancel_futures=True)
            raise
