#!/usr/bin/env python
"""Write the tables of docs/performance.md and the README from docs/performance/*.json, which the benchmark makes.

python -m benchmarks.tables

A table stands between two comments, `<!-- table NAME -->` and `<!-- end -->`; what is around them is written by hand.
"""

import json
import re
import statistics
from pathlib import Path

from tabulate import tabulate

from .machine import GIB
from .report import spread

ROOT = Path(__file__).resolve().parent.parent
PAGES, FOLDER = (ROOT / "docs" / "performance.md", ROOT / "README.md"), ROOT / "docs" / "performance"
MIB = 2**20
# GPU hours and MB of memory by the number of auxiliary heads, as the paper has them.
PAPER = {0: (70, 12808), 1: (86, 13947), 2: (120, 14387), 3: (150, 15263), 6: (280, 19385)}
LEAST_SHARE = 0.005  # of the time, for a part to have a row


def main() -> None:
    for page in PAGES:
        page.write_text(with_tables(page.read_text()))


def with_tables(page: str) -> str:
    """The page with its tables made anew."""
    block = re.compile(r"(<!-- table (\w+) -->\n).*?(<!-- end -->)", re.DOTALL)
    return block.sub(lambda match: f"{match[1]}{TABLES[match[2]]()}\n{match[3]}", page)


def read(name: str) -> dict:
    return json.loads((FOLDER / f"{name}.json").read_text())


def table(rows: list[dict]) -> str:
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def memory(measured: dict) -> str:
    return f"{measured['peak_bytes'] / GIB:.2f} GiB"


def ratios(result: dict) -> tuple[float, float]:
    """Time and memory of the second side, as multiples of the first."""
    first, second = result["sides"].values()
    return second["median"] / first["median"], second["peak_bytes"] / first["peak_bytes"]


def machine() -> str:
    report = read("parts_float32")
    machine, peaks = report["machine"], report["peaks"]
    return (
        f"{machine['cores']} cores of an x86-64 server processor with {' and '.join(machine['cpu_features'])}, "
        f"{machine['threads']} threads, {machine['memory_gib']} GiB of\nmemory, torch {machine['torch']}, no GPU. The "
        f"peaks of this machine, measured with the roofline: {peaks['float32'] / 1e9:.0f} GFLOP/s in float32, "
        f"{peaks['bfloat16'] / 1e9:.0f}\nGFLOP/s in bfloat16, {peaks['copy'] / 1e9:.0f} GB/s of copied memory."
    )


def speed() -> str:
    """The README's."""
    rows = []

    def add(what: str, ours: str, other: str, ratio: str) -> None:
        rows.append({"": what, "this project": ours, "beside it": other, "ratio": ratio})

    for name, what in (
        ("inference_float32", "inference, Co-Deformable-DETR R50, 800x1333, float32"),
        ("inference_bfloat16", "the same in bfloat16 (`MODEL.CODETR.INFERENCE_DTYPE`)"),
    ):
        [result] = read(name)["results"]
        ours, theirs = (spread(x["seconds"])[0] for x in result["sides"].values())
        add(what, ours, f"{theirs}, transformers' Deformable DETR R50", f"{ratios(result)[0]:.1f}")
    sides = read("runtimes")["results"][0]["sides"]
    int8, alone, float32 = (sides[x]["median"] for x in ("int8", "openvino-int8", "ours"))
    add(
        "the same in int8, on two cores without AMX",
        f"{int8:.2f} s",
        f"{alone:.2f} s, OpenVINO alone with the same file; {float32:.2f} s, this project in float32",
        f"{alone / int8:.1f}; {float32 / int8:.1f}",
    )
    [result] = read("train")["results"]
    ours, theirs = (f"{spread(x['seconds'])[0]}, {memory(x)}" for x in result["sides"].values())
    plain = "the same model in plain PyTorch with one decoder pass for each head"
    add("training step, Co-DINO R50 with five scales, 480x640", ours, f"{theirs}: {plain}", f"{ratios(result)[0]:.1f}")
    medians = {}
    for name in ("op_eager", "op_package"):
        seconds = read(name)["results"][-1]["passes"]["forward + backward"]["seconds"]
        medians[name] = [statistics.median(x) for x in seconds.values()]
    (ours, eager), (ours_again, package) = medians.values()
    add(
        "deformable attention, forward and backward, five scales, 800x1333",
        f"{ours:.2f} s",
        f"{package:.2f} s, `torch-ms-deform-attn`; {eager:.1f} s, plain PyTorch",
        f"{package / ours_again:.1f}; {eager / ours:.1f}",
    )
    return table(rows)


def operator() -> str:
    rows = []
    for name in ("op_eager", "op_package", "op_bfloat16", "op_float64"):
        for result in read(name)["results"]:
            for kind, measured in result["passes"].items():
                (_, ours), (other, theirs) = measured["seconds"].items()
                extra = measured["extra_bytes"].values()
                rows.append(
                    {
                        "dtype": result["dtype"],
                        "size": f"{result['size']}, {result['tokens']} tokens",
                        "pass": kind,
                        "ours": spread(ours)[0],
                        "other": f"{other}: {spread(theirs)[0]}",
                        "other / ours": f"**{statistics.median(theirs) / statistics.median(ours):.1f}**",
                        "extra memory: ours, other": ", ".join(f"{x / MIB:.0f}" for x in extra) + " MiB",
                    }
                )
    return table(rows)


def inference() -> str:
    rows = []
    for name in ("float32", "bfloat16"):
        [result] = read(f"inference_{name}")["results"]
        row = {"dtype": name}
        for side, measured in result["sides"].items():
            middle, ends = spread(measured["seconds"])
            row[side] = f"{middle} ({ends})"
        row["hf / ours"] = f"**{ratios(result)[0]:.2f}**"
        row["memory: ours, hf"] = ", ".join(memory(x) for x in result["sides"].values())
        rows.append(row)
    return table(rows)


def runtimes() -> str:
    file = read("runtimes")
    [result] = file["results"]
    rows = []
    ours = result["sides"]["ours"]["median"]
    for side, measured in result["sides"].items():
        middle, ends = spread(measured["seconds"])
        ratio = f"**{measured['median'] / ours:.2f}**"
        rows.append({"": side, "time": f"{middle} ({ends})", "time / ours": ratio, "memory": memory(measured)})
    machine = file["machine"]
    return f"{machine['cores']} cores with {', '.join(machine['cpu_features'])}:\n\n{table(rows)}"


def train() -> str:
    [result] = read("train")["results"]
    rows = []
    for side, measured in result["sides"].items():
        middle, ends = spread(measured["seconds"])
        rows.append({"side": side, "median": middle, "fastest to slowest": ends, "peak memory": memory(measured)})
    time, peak = ratios(result)
    rows.append({"side": "ratio", "median": f"**{time:.2f}**", "peak memory": f"**{peak:.2f}**"})
    return table(rows)


def auxiliary_heads() -> str:
    [result] = read("auxiliary_heads")["results"]
    two, none = result["sides"].values()
    rows = []
    for k, side in ((0, none), (2, two)):
        median, extremes = spread(side["seconds"])
        rows.append({"K": k, "median": median, "fastest to slowest": extremes, "peak memory": memory(side)})
    time, peak = (two[key] / none[key] for key in ("median", "peak_bytes"))
    return table([*rows, {"K": "ratio", "median": f"**{time:.2f}**", "peak memory": f"**{peak:.2f}**"}])


def memory_of_training() -> str:
    rows = []
    for name, what in (("memory", "off"), ("memory_checkpointing", "on, for transformer and backbone")):
        [result] = read(name)["results"]
        ours = result["sides"]["ours"]
        time = spread(ours["seconds"])[0]
        rows.append({"activation checkpointing": what, "time": time, "peak memory": f"**{memory(ours)}**"})
    return table(rows)


def sweep(name: str, title: str) -> str:
    rows = []
    for result in read(name)["results"]:
        row = {title: result["value"]}
        for side, measured in result["sides"].items():
            row[f"{side}: time"], row[f"{side}: memory"] = spread(measured["seconds"])[0], memory(measured)
        rows.append(row)
    return table(rows)


def auxiliary_growth(name: str, title: str) -> str:
    """Time and memory with auxiliary heads beside K = 0, which was measured in turn with each row."""
    rows = []
    for result in read(name)["results"]:
        ours, none = result["sides"].values()
        pairs = [x / y for x, y in zip(ours["seconds"], none["seconds"])]
        row = {
            title: result["value"],
            "time": spread(ours["seconds"])[0],
            "K = 0 in turn": spread(none["seconds"])[0],
            "ratio (least to most)": f"**{statistics.median(pairs):.2f}** ({min(pairs):.2f} to {max(pairs):.2f})",
            "memory": memory(ours),
            "ratio": f"**{ours['peak_bytes'] / none['peak_bytes']:.2f}**",
        }
        if result["value"] in PAPER:
            hours, megabytes = PAPER[result["value"]]
            row["the paper: time, memory"] = f"{hours / PAPER[0][0]:.2f}, {megabytes / PAPER[0][1]:.2f}"
        rows.append(row)
    return table(rows)


def loader() -> str:
    rows = []
    for name, recipe in (
        ("loader_detr", "DETR augmentation, up to 800x1333"),
        ("loader_jitter", "large-scale jitter with copy-paste, 1024x1024"),
    ):
        alone, together = read(name)["mapper"], read(name)["loader"]
        rows.append(
            {
                "recipe": recipe,
                "mapper alone, one process": f"{alone['images_per_second']:.0f} images/s",
                "loader": f"{together['images_per_second']:.0f} images/s, {together['workers']} processes",
            }
        )
    return table(rows)


def annotations() -> str:
    rows = []
    for name, what in (
        ("annotations", "reading 118 287 images with 661 675 objects"),
        ("evaluation", "box AP of 5000 images with 300 detections each"),
    ):
        for side, measured in read(name)["sides"].items():
            median, both_ends = spread(measured["seconds"])
            row = {"what": what, "by": side, "median": median, "fastest to slowest": both_ends}
            rows.append({**row, "peak memory": memory(measured)})
    return table(rows)


def loop() -> str:
    rows: dict[str, dict] = {}
    for name, title in (("loop", "as it is"), ("loop_ema", "with a moving average")):
        report = read(name)
        iterations = report["iterations"]
        totals = {part: sum(x[part] for x in iterations) for part in iterations[0]}
        whole = sum(totals.values())
        outside = report["outside_share"]
        shares = {part: (total / whole, part) for part, total in totals.items()}
        shares["all but forward and backward"] = outside, None
        shares["the same without the optimizer's step"] = outside - totals["optimizer"] / whole, None
        for row, (share, part) in shares.items():
            cell = f"{share:.1%}"
            if part:
                cell = f"{1000 * statistics.median(x[part] for x in iterations):.1f} ms, {cell}"
            rows.setdefault(row, {"part": row})[title] = cell
    return table(list(rows.values()))


def parts(name: str) -> str:
    report = read(name)
    rows = []
    for part, x in sorted(report["parts"].items(), key=lambda item: -item[1]["seconds"]):
        share = x["seconds"] / sum(other["seconds"] for other in report["parts"].values())
        if share >= LEAST_SHARE:
            rows.append(
                {
                    "part": part,
                    "ms": f"{1000 * x['seconds']:.0f}",
                    "share of time": f"{share:.0%}",
                    "GFLOP": f"{x['flops'] / 1e9:.1f}",
                    "GB": f"{x['bytes'] / 1e9:.2f}",
                    "of peak FLOP/s": f"{x['share_of_peak_flops']:.0%}",
                    "of peak bandwidth": f"{x['share_of_peak_bandwidth']:.0%}",
                }
            )
    return table(rows)


TABLES = {
    "speed": speed,
    "machine": machine,
    "operator": operator,
    "inference": inference,
    "runtimes": runtimes,
    "train": train,
    "auxiliary_heads": auxiliary_heads,
    "memory": memory_of_training,
    "size": lambda: sweep("size", "side, pixels"),
    "queries": lambda: sweep("queries", "queries"),
    "batch": lambda: sweep("batch", "images"),
    "objects": lambda: sweep("objects", "objects"),
    "k": lambda: auxiliary_growth("k", "K"),
    "head": lambda: auxiliary_growth("head", "the only head"),
    "loader": loader,
    "annotations": annotations,
    "loop": loop,
    "parts_float32": lambda: parts("parts_float32"),
    "parts_bfloat16": lambda: parts("parts_bfloat16"),
    "parts_train": lambda: parts("parts_train"),
}


if __name__ == "__main__":
    main()
