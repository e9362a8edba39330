"""The benchmark's output: tables, JSON files and plots."""

import json
import statistics
from pathlib import Path

from benchmark_machine import GIB
from matplotlib.figure import Figure
from tabulate import tabulate

__all__ = ["machine_line", "measurement_rows", "plot_measurements", "print_table", "save", "spread"]


def machine_line(machine: dict) -> str:
    """The machine and its load in one line."""
    where = machine["gpu"] or f"{machine['cores']} cores with {', '.join(machine['cpu_features']) or 'no known extension'}"
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


def plot_measurements(name: str, title: str, results: list[dict]) -> Figure:
    """Time and memory of every side: lines against numbers, bars for named values."""
    figure = Figure(figsize=(10, 4), layout="constrained")
    axes = figure.subplots(1, 2)
    values = [result["value"] for result in results]
    are_numbers = all(isinstance(value, (int, float)) for value in values)
    sides = list(results[0]["sides"])
    for i, side in enumerate(sides):
        measured = [result["sides"][side] for result in results]
        medians = [x["median"] for x in measured]
        ranges = [[m - min(x["seconds"]) for m, x in zip(medians, measured)]]
        ranges.append([max(x["seconds"]) - m for m, x in zip(medians, measured)])
        peaks = [float("nan") if x["peak_bytes"] is None else x["peak_bytes"] / GIB for x in measured]
        if are_numbers:
            axes[0].errorbar(values, medians, yerr=ranges, marker="o", capsize=3, label=side)
            axes[1].plot(values, peaks, marker="o", label=side)
            continue
        width = 0.8 / len(sides)
        places = [j + (i - (len(sides) - 1) / 2) * width for j in range(len(values))]
        axes[0].bar(places, medians, width, yerr=ranges, capsize=3, label=side)
        axes[1].bar(places, peaks, width, label=side)
    for ax, what in zip(axes, ("seconds", "peak memory in GiB")):
        ax.set_xlabel(name)
        ax.set_ylabel(what)
        ax.set_ylim(bottom=0)
        ax.grid(axis="y", alpha=0.3)
        ax.legend()
        if not are_numbers:
            ax.set_xticks(range(len(values)), values)
    figure.suptitle(title)
    return figure
