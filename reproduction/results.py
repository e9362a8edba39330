"""What is known of each run, and the file that keeps it."""

import dataclasses
import json
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from codetr_d2.checkpoint.checkpointer import atomic_write
from codetr_d2.errors import InputError

__all__ = ["Results", "RunResult"]


@dataclass
class RunResult:
    """The numbers of one run. What does not apply to it is empty.

    Attributes:
        setting, experiment, seed: which run it is.
        machine: what it was measured on, as text.
        ap_by_iteration: (iterations trained, AP of boxes on the test set in percent), the last one at the end. Of the
            detector; of the branch where there is no detector.
        instability: (iterations trained, IS since the evaluation before).
        discriminability: area under the IoF-IoB curve, by "backbone" and "encoder".
        attention: area under the IoF-IoB curve of the decoder's cross-attention.
        conflict: S_ij in nats by the names of head i and head j.
        queries: by the auxiliary head "positives per object", "positive distance", "negative distance".
        branches: AP with NMS in percent, by the auxiliary head.
    """

    setting: str
    experiment: str
    seed: int
    machine: str
    ap_by_iteration: list[tuple[int, float]]
    instability: list[tuple[int, float]] = field(default_factory=list)
    discriminability: dict[str, float] = field(default_factory=dict)
    attention: float | None = None
    conflict: dict[str, dict[str, float]] = field(default_factory=dict)
    queries: dict[str, dict[str, float]] = field(default_factory=dict)
    branches: dict[str, float] = field(default_factory=dict)

    @property
    def ap(self) -> float:
        """At the end of the training."""
        return self.ap_by_iteration[-1][1]

    @property
    def mean_instability(self) -> float:
        """Of all evaluations."""
        return sum(x for _, x in self.instability) / len(self.instability)

    @property
    def mean_conflict(self) -> float:
        """The mean of all S_ij, which is that of all S_i too (paper, eqs. 9 and 10)."""
        values = [x for row in self.conflict.values() for x in row.values()]
        return sum(values) / len(values)


@dataclass
class Results:
    """The runs that are known.

    Attributes:
        runs: in any order, each once.
    """

    runs: list[RunResult]

    @classmethod
    def read(cls, file: Path) -> "Results":
        """What an earlier call wrote; nothing where there is no file.

        Raises:
            InputError: the file is another one.
        """
        if not file.is_file():
            return cls([])
        try:
            return cls([RunResult(**x) for x in json.loads(file.read_text())])
        except (ValueError, TypeError):
            raise InputError(f"{file} holds no results of a reproduction; remove it, and run this again") from None

    def write(self, file: Path) -> None:
        """Write one line for each run."""
        runs = sorted(self.runs, key=lambda x: (x.setting, x.experiment, x.seed))
        lines = ",\n".join(json.dumps(dataclasses.asdict(x)) for x in runs)
        content = f"[\n{lines}\n]\n"
        file.parent.mkdir(parents=True, exist_ok=True)
        atomic_write(str(file), lambda out: out.write(content.encode()))

    def updated(self, runs: Sequence[RunResult]) -> "Results":
        """With these runs in the place of all that are known of their settings."""
        settings = {x.setting for x in runs}
        return Results([*(x for x in self.runs if x.setting not in settings), *runs])

    def of(self, setting: str, experiment: str) -> list[RunResult]:
        """The runs of an experiment, by rising seed."""
        found = [x for x in self.runs if (x.setting, x.experiment) == (setting, experiment)]
        return sorted(found, key=lambda x: x.seed)

    def values(self, setting: str, experiment: str, value: Callable[[RunResult], float]) -> list[float]:
        """A number of each run of an experiment."""
        return [value(x) for x in self.of(setting, experiment)]
