"""The benchmark's output: tables, JSON files and plots."""

import json
import statistics
from collections.abc import Iterable
from pathlib import Path

from matplotlib.figure import Figure
from tabulate import tabulate

from .machine import GIB

__all__ = ["machine_line", "measurement_rows", "plot_bars", "plot_measurements", "print_table", "save", "spread"]

AXES = {
    "size": "side of a square image in pixels",
    "queries": "queries",
    "objects": "objects in an image",
    "k": "auxiliary heads (K)",
    "batch": "images in a batch",
}


def machine_line(machine: dict) -> str:
    """The machine and its load in one line."""
    where = (
        machine["gpu"] or f"{machine['cores']} cores with {', '.join(machine['cpu_features']) or 'no known extension'}"
    )
    memory = "" if machine["memory_gib"] is None else f", {machine['memory_gib']} GiB"
    return (
        f"{where}{memory}, {machine['threads']} threads, torch {machine['torch']}, "
        f"load average before: {machine['load_before']:.1f}"
    )


def spread(seconds: list[float]) -> tuple[str, str]:
    """Median, and fastest to slowest, in a unit that fits."""
    unit, factor = ("s", 1) if statistics.median(seconds) >= 1 else ("ms", 1000)
    values = [factor * x for x in seconds]
    return f"{statistics.median(values):.3g} {unit}", f"{min(values):.3g} to {max(values):.3g}"


def measurement_rows(name: str, results: list[dict]) -> list[dict]:
    """Rows of the table of ``inference`` and ``train``: one for each value of what is swept, and side."""
    rows = []
    for result in results:
        first = next(iter(result["sides"].values()))
        for side, measured in result["sides"].items():
            row = {name: result["value"], "side": side}
            row["median"], row["fastest to slowest"] = spread(measured["seconds"])
            for part in ("forward", "backward"):
                if part in measured:
                    row[part] = spread(measured[part])[0]
            row["images/s"] = f"{measured['images_per_second']:.3g}"
            peak = measured["peak_bytes"]
            row["peak memory"] = "unknown" if peak is None else f"{peak / GIB:.2f} GiB"
            if len(result["sides"]) > 1:
                row["time / ours"] = f"{measured['median'] / first['median']:.2f}"
                if peak and first["peak_bytes"]:
                    row["memory / ours"] = f"{peak / first['peak_bytes']:.2f}"
            rows.append(row)
    return rows


def print_table(rows: list[dict]) -> None:
    """As Markdown."""
    print(tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True), flush=True)


def save(report: dict, figure: Figure, output: Path) -> None:
    """Write ``output``, a JSON file, and the figure beside it as a PNG."""
    output.write_text(json.dumps(report, indent=2) + "\n")
    figure.savefig(output.with_suffix(".png"), dpi=120)


def plot_bars(title: str, values: dict[str, dict[str, dict[str, float | list[float]]]]) -> Figure:
    """A plot for each quantity: a bar for each place and series, as high as the median, with its least and largest.

    Args:
        title: of the figure.
        values: by quantity, series and place: one number or all that were measured.
    """
    most = max(len(by_place) for all_series in values.values() for by_place in all_series.values())
    are_many = most > 4  # then their names stand upright
    figure = Figure(figsize=(5.5 * len(values) + 1, 7 if are_many else 4.5), layout="constrained")
    for ax, (quantity, all_series) in zip(figure.subplots(1, len(values), squeeze=False)[0], values.items()):
        width = 0.8 / len(all_series)
        for i, (series, by_place) in enumerate(all_series.items()):
            medians, ranges = _medians(by_place.values())
            places = [j + (i - (len(all_series) - 1) / 2) * width for j in range(len(medians))]
            ax.bar(places, medians, width, yerr=ranges if any(map(any, ranges)) else None, capsize=3, label=series)
            ax.set_xticks(range(len(by_place)), by_place, rotation=90 if are_many else 0)
        _finish(ax, quantity)
    figure.suptitle(title)
    return figure


def plot_lines(title: str, name: str, values: dict[str, dict[str, dict[float, float | list[float]]]]) -> Figure:
    """As :func:`plot_bars`, with lines over numbers, those of ``name``, in place of bars at places."""
    figure = Figure(figsize=(5.5 * len(values) + 1, 4.5), layout="constrained")
    for ax, (quantity, all_series) in zip(figure.subplots(1, len(values), squeeze=False)[0], values.items()):
        for series, by_number in all_series.items():
            medians, ranges = _medians(by_number.values())
            ax.errorbar(list(by_number), medians, yerr=ranges, marker="o", capsize=3, label=series)
        ax.set_xlabel(name)
        _finish(ax, quantity)
    figure.suptitle(title)
    return figure


def _medians(values: Iterable[float | list[float]]) -> tuple[list[float], list[list[float]]]:
    """The median of each entry, and how far its least and its largest number are from that."""
    lists = [x if isinstance(x, list) else [x] for x in values]
    medians = [statistics.median(x) for x in lists]
    return medians, [[m - min(x) for m, x in zip(medians, lists)], [max(x) - m for m, x in zip(medians, lists)]]


def _finish(ax, quantity: str) -> None:
    ax.set_ylabel(quantity)
    ax.set_ylim(bottom=0)
    ax.grid(axis="y", alpha=0.3)
    if len(ax.get_legend_handles_labels()[1]) > 1:
        ax.legend()


def plot_measurements(name: str, title: str, results: list[dict]) -> Figure:
    """Time and memory of every side of ``inference`` and ``train``: lines against numbers, bars for named values."""
    seconds, memory = {}, {}
    for result in results:
        for side, measured in result["sides"].items():
            seconds.setdefault(side, {})[result["value"]] = measured["seconds"]
            peak = measured["peak_bytes"]
            memory.setdefault(side, {})[result["value"]] = float("nan") if peak is None else peak / GIB
    values = {"seconds": seconds, "peak memory in GiB": memory}
    if all(isinstance(result["value"], int) for result in results):
        return plot_lines(title, AXES[name], values)
    return plot_bars(title, values)
