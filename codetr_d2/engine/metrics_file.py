"""``metrics.json`` of a training, as detectron2 writes it: one JSON object for each time that something is logged."""

import json
import math
from pathlib import Path

__all__ = ["is_finished", "read_metrics"]


def read_metrics(folder: Path) -> list[dict]:
    """What ``metrics.json`` in an output folder says of each iteration, in order; nothing where there is no such file.

    Returns:
        For each iteration "iteration", and the values by their names; what was no number is NaN.
    """
    file = folder / "metrics.json"
    metrics: dict[int, dict] = {}
    for line in file.read_text().splitlines() if file.is_file() else ():
        try:
            values = json.loads(line)
        except ValueError:  # the run was killed while it wrote the line
            continue
        values = {name: math.nan if value is None else value for name, value in values.items()}
        metrics.setdefault(values["iteration"], {}).update(values)
    return [metrics[iteration] for iteration in sorted(metrics)]


def is_finished(folder: Path) -> bool:
    """Whether the training of an output folder ended: its final evaluation is the last thing that is logged."""
    metrics = read_metrics(folder)
    return (folder / "model_final.pth").is_file() and bool(metrics) and "bbox/AP" in metrics[-1]
