"""Numbers of an analysis as files."""

import csv
import json
from collections.abc import Sequence
from pathlib import Path

from ..errors import named_disk_problems

__all__ = ["write_rows"]


def write_rows(folder: Path, name: str, rows: Sequence[dict]) -> None:
    """Write ``name.json``, a list of objects, and ``name.csv``, the same as a table with the first row's keys.

    Raises:
        InputError: the disk is full or broken.
    """
    with named_disk_problems(str(folder)):
        (folder / f"{name}.json").write_text(json.dumps(rows, indent=1) + "\n")
        with open(folder / f"{name}.csv", "w", newline="") as file:
            writer = csv.DictWriter(file, list(rows[0]) if rows else [])
            writer.writeheader()
            writer.writerows(rows)
