"""Everything that the page of a run shows, as plain data: what json can hold, NaN as None."""

import math
import os
import re
import shlex
from collections import Counter
from collections.abc import Sequence

import numpy as np
from detectron2.config import get_cfg
from detectron2.data.transforms import ResizeShortestEdge

from ..analysis.cost import build_with_random_weights, measure_cost, parts_of
from ..config.config_file import options_of, plain, resolve_device
from ..config.defaults import add_codetr_config
from ..evaluation.evaluator import precisions
from ..modeling.auxiliary.base import auxiliary_head_names
from .confusion import objects_meant
from .curves import interpolated_precision, score_curve
from .detections import Detections, GroundTruth, Task, find_matches
from .errors import ERROR_KINDS, MISSED, ap_without_each_kind, find_errors
from .run import Run
from .training import training_charts

__all__ = [
    "THRESHOLDS",
    "Evaluated",
    "class_rows",
    "config_differences",
    "cost_of",
    "evaluate_task",
    "run_data",
    "tasks",
]

THRESHOLDS = np.arange(100) / 100  # scores between which the page chooses
AREAS = ("", "s", "m", "l")
TIMED_RUNS = 3
VERSIONS = ("codetr_d2", "detectron2", "Python", "PyTorch", "torchvision", "numpy", "CUDA compiler", "GPU available")


class Evaluated:
    """The matches and errors of a run's detections by one kind of overlap.

    Attributes:
        truth, found, matches, errors: see :mod:`.detections` and :mod:`.errors`.
        meant, uncounted: what :func:`objects_meant` gives.
    """

    def __init__(self, run: Run, task: Task):
        self.truth = GroundTruth.of(run.dataset)
        self.found = Detections.of(run.dataset, run.results, task, run.style)
        self.matches = find_matches(self.truth, self.found, task)
        self.errors = find_errors(self.truth, self.found, task, self.matches)
        self.meant, self.uncounted = objects_meant(self.truth, self.found, task)

    @property
    def points(self) -> np.ndarray:
        """[M] scores in whole ten-thousandths, as the page has them: never more than the score."""
        return np.floor(self.found.scores * 10_000 + 1e-6).astype(int)

    @property
    def bins(self) -> np.ndarray:
        """[M] index into THRESHOLDS of the highest that each detection reaches."""
        return np.minimum(self.points // 100, len(THRESHOLDS) - 1)

    def last_bins(self) -> tuple[np.ndarray, np.ndarray]:
        """[N] for each object the bin up to which it is found, and [N] up to which it is found or meant by an error of
        class or location, above which it is missed; -1 where it never is.
        """
        found = np.append(self.bins, -1)[self.matches.found_by]
        meant, there = found.copy(), self.errors.meant >= 0
        np.maximum.at(meant, self.errors.meant[there], self.bins[there])
        return found, meant


def tasks(run: Run) -> list[Task]:
    """What a run is evaluated by: boxes, and masks where it has some."""
    return ["bbox", "segm"] if any("segmentation" in x for x in run.results) else ["bbox"]


def evaluate_task(run: Run, task: Task, evaluated: Evaluated) -> dict:
    """The numbers of a run by one kind of overlap.

    Returns:
        ``overall``: AP, AP50, AP75, APs, APm, APl. ``classes``: see :func:`class_rows`. ``curves``: of each class,
        and as the last row of their mean, ``precision_by_recall`` [101] at an IoU of 0.5, and ``precision``, ``recall``
        and ``f1`` at each of THRESHOLDS. ``best_bin``, ``best_f1``: where the mean F1 is best, as an index into
        THRESHOLDS, and that F1. ``errors``: of each ``kind`` the ``cost``, which is what AP50 would gain without it (0
        where it would lose), and AP50 itself. ``counts``: [kind, class, bin of the score, number] of errors; for missed
        objects the last bin in which they are not. ``confusion``: [true class, class, bin, number], background being
        one class more.
    """
    truth, found, matches = evaluated.truth, evaluated.found, evaluated.matches
    number = len(run.class_names)
    precision = precisions(run.dataset, run.results, task, run.style)[:, :, :number]
    num_objects = np.bincount(truth.classes[~truth.crowds], minlength=number)
    by_recall, curves = [], []
    for k in range(number):
        own = (found.classes == k) & ~matches.ignored
        if num_objects[k]:
            right = matches.is_true[own]
            by_recall.append(interpolated_precision(found.scores[own], right, num_objects[k]))
            curves.append(score_curve(found.scores[own], right, num_objects[k], THRESHOLDS))
        else:
            by_recall.append(None)
            curves.append(None)
    there = [k for k in range(number) if num_objects[k]]
    mean_f1 = np.mean([curves[k].f1 for k in there], axis=0)
    best = int(mean_f1.argmax())
    ap50, without = ap_without_each_kind(truth, found, matches, evaluated.errors, number)

    def lines(values: list) -> list:
        """The curve of each class, and their mean, each where it is defined."""
        with np.errstate(invalid="ignore"):
            rows = np.array([values[k] for k in there])
            mean = np.nansum(rows, axis=0) / np.isfinite(rows).sum(0)
        return [_numbers(x, 3) for x in [*values, mean]]

    return {
        "overall": _ap_of(precision),
        "classes": class_rows(run.class_names, precision, num_objects, curves),
        "curves": {
            "precision_by_recall": lines(by_recall),
            **{x: lines([c and getattr(c, x) for c in curves]) for x in ("precision", "recall", "f1")},
        },
        "best_bin": best,
        "best_f1": _number(100 * mean_f1[best], 1),
        "errors": [
            {"kind": kind, "cost": _number(max(without[kind] - ap50, 0.0), 2), "ap50": _number(ap50, 2)}
            for kind in ERROR_KINDS
        ],
        "counts": _error_counts(evaluated),
        "confusion": _confusion_counts(evaluated, number),
    }


def class_rows(names: Sequence[str], precision: np.ndarray, num_objects: np.ndarray, curves: Sequence) -> list[dict]:
    """For each class ``name``, ``objects``, AP, AP50, AP75, APs, APm, APl, and where F1 is best ``score``, ``f1``,
    ``precision``, ``recall``.
    """
    rows = []
    for k, name in enumerate(names):
        row = {"name": name, "objects": int(num_objects[k]), **_ap_of(precision[:, :, k : k + 1])}
        if curves[k] is not None:
            row["score"] = _number(np.floor(curves[k].best_score * 1000) / 1000, 3)
            for key, value in (("f1", "best_f1"), ("precision", "precision_at_best"), ("recall", "recall_at_best")):
                row[key] = _number(100 * getattr(curves[k], value), 1)
        rows.append(row)
    return rows


def _ap_of(precision: np.ndarray) -> dict:
    """AP, AP50, AP75 and AP by area in percent, from precisions [T, R, K, A]."""

    def mean(values: np.ndarray) -> float | None:
        values = values[values > -1]
        return _number(100 * values.mean(), 2) if values.size else None

    ap = {f"AP{area}": mean(precision[..., i]) for i, area in enumerate(AREAS)}
    ap["AP50"], ap["AP75"] = mean(precision[0, ..., 0]), mean(precision[5, ..., 0])
    return ap


def _error_counts(evaluated: Evaluated) -> list[list[int]]:
    truth, found, errors, bins = evaluated.truth, evaluated.found, evaluated.errors, evaluated.bins
    wrong, objects = errors.kinds >= 0, ~truth.crowds
    counts = Counter(zip(errors.kinds[wrong].tolist(), found.classes[wrong].tolist(), bins[wrong].tolist()))
    missed_above = evaluated.last_bins()[1]
    counts.update((MISSED, *x) for x in zip(truth.classes[objects].tolist(), missed_above[objects].tolist()))
    return [[*key, value] for key, value in sorted(counts.items())]


def _confusion_counts(evaluated: Evaluated, num_classes: int) -> list[list[int]]:
    counted = ~evaluated.uncounted
    rows = np.where(evaluated.meant >= 0, np.append(evaluated.truth.classes, 0)[evaluated.meant], num_classes)
    columns = evaluated.found.classes
    keys = zip(rows[counted].tolist(), columns[counted].tolist(), evaluated.bins[counted].tolist())
    return [[*key, value] for key, value in sorted(Counter(keys).items())]


def run_data(run: Run, evaluated: dict[Task, Evaluated], with_cost: bool = True) -> dict:
    """What the page shows of a run, but for its pictures.

    Args:
        run: the run.
        evaluated: by each of its :func:`tasks`.
        with_cost: whether to build its model and to run it, for its parameters, FLOPs and time.
    """
    return {
        "name": run.folder.resolve().name,
        "tasks": {task: evaluate_task(run, task, evaluated[task]) for task in evaluated},
        "training": [
            {**chart, "series": [{**x, "y": [float(f"{y:.5g}") for y in x["y"]]} for x in chart["series"]]}
            for chart in training_charts(run.metrics, auxiliary_head_names(run.cfg.MODEL.CODETR.AUX_HEADS))
        ],
        "config": config_differences(run),
        "about": about(run, evaluated["bbox"].truth),
        "cost": cost_of(run) if with_cost else None,
        "commands": commands(run),
    }


def config_differences(run: Run) -> list[dict]:
    """``key``, ``default`` and ``value`` of each option that is not at its default; OUTPUT_DIR is left out."""
    default = get_cfg()
    add_codetr_config(default)
    before = dict(options_of(default, default))
    return [
        {"key": key, "default": _shown(before.get(key)), "value": _shown(value)}
        for key, value in options_of(run.cfg, default)
        if key != "OUTPUT_DIR" and plain(before.get(key)) != plain(value)
    ]


def about(run: Run, truth: GroundTruth) -> list[list[str]]:
    """[what, value] of the run."""
    objects, crowds = int((~truth.crowds).sum()), int(truth.crowds.sum())
    rows = [["folder", str(run.folder)], ["test dataset", f"{run.dataset_name}, {run.dataset.source}"]]
    what = f"{len(run.dataset.records)} images with {objects} objects" + (f" and {crowds} crowds" if crowds else "")
    rows.append(["tested on", what])
    rows.append(["detections", f"{len(run.results)}"])
    if run.weights:
        rows.append(["weights", f"{run.weights}, {run.weights.stat().st_size / 1e6:.1f} MB"])
    rows.append(["began from", run.cfg.MODEL.WEIGHTS or "random weights"])
    if run.metrics:
        rows.append(["iterations", str(run.metrics[-1]["iteration"] + ("total_loss" in run.metrics[-1]))])
    rows += [[f"{name} in training", value] for name, value in _versions(run).items()]
    return rows


def _versions(run: Run) -> dict[str, str]:
    """What the log says of the environment that trained."""
    log = run.folder / "log.txt"
    if not log.is_file():
        return {}
    with open(log, encoding="utf-8", errors="replace") as file:
        head = file.read(20000)
    found = dict(re.findall(r"^(\S.*?) {2,}(\S.*)$", head, re.MULTILINE))
    return {name: found[name].split(" @")[0] for name in VERSIONS if name in found}


def commands(run: Run) -> list[list[str]]:
    """[what, command line] to go on from here."""
    weights = str(run.weights or run.folder / "model_final.pth")
    model = ["--config-file", str(run.folder / "config.yaml")]
    evaluate = ["codetr_d2", "evaluate", *model, "MODEL.WEIGHTS", weights]
    predict = [
        "codetr_d2",
        "predict",
        "PICTURE",
        *model,
        "--weights",
        weights,
        "--output",
        str(run.folder / "found"),
    ]
    return [["evaluate again", shlex.join(evaluate)], ["predict", shlex.join(predict)]]


def cost_of(run: Run) -> dict:
    """Parameters, FLOPs and time for a picture of the size of the first test picture, on this machine."""
    cfg = run.cfg.clone()
    cfg.MODEL.DEVICE = resolve_device(cfg)
    cfg.MODEL.CODETR.COMPILE = False  # inside compiled modules nothing can be counted
    record = run.dataset.records[0]
    size = (record.get("height", 800), record.get("width", 800))
    if cfg.INPUT.MIN_SIZE_TEST > 0:
        size = ResizeShortestEdge.get_output_shape(*size, cfg.INPUT.MIN_SIZE_TEST, cfg.INPUT.MAX_SIZE_TEST)
    cost = measure_cost(build_with_random_weights(cfg), size, TIMED_RUNS)
    return {
        "size": list(size),
        "device": cfg.MODEL.DEVICE,
        "cores": os.cpu_count(),
        "seconds": _number(cost.median_seconds, 4),
        "parameters": cost.total.parameters,
        "parameters_at_inference": cost.total.parameters_at_inference,
        "flops": cost.total.flops,
        "parts": [{"name": name, "parameters": x.parameters, "flops": x.flops} for name, x in parts_of(cost).items()],
    }


def _shown(value: object) -> str:
    return "" if value is None else str(plain(value))


def _number(value: float | None, digits: int) -> float | None:
    return None if value is None or not math.isfinite(value) else round(float(value), digits)


def _numbers(values: Sequence[float] | np.ndarray | None, digits: int) -> list | None:
    return None if values is None else [_number(x, digits) for x in values]
