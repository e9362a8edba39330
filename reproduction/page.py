"""The page: what holds, and the numbers and pictures behind it."""

import textwrap
from collections.abc import Callable
from pathlib import Path

from tabulate import tabulate

from .claims import CLAIMS, Claim
from .plans import PLANS, Setting
from .results import Results

__all__ = ["page_text", "write_page"]

WIDTH = 120  # characters of a line of text

INTRODUCTION = """\
# The paper in miniature

Which claims of *DETRs with Collaborative Hybrid Assignments Training* show on a laptop? Small models, whose backbone
was trained on ImageNet, are trained briefly and measured as the paper measures its own. `make reproduce` and
`make reproduce-more` write this page with its pictures and numbers.

A claim **holds** here where every seed is on its side: each value of the one above each value of the other. With three
seeds of both, chance does that once in twenty. Values are means and sample standard deviations over the seeds.

The paper's numbers are of COCO: only directions can be compared. Its shortest runs, of 12 epochs, see 1.4 million
pictures; these see a few thousand small ones. Where a claim does not show, the section says how many seeds would tell a
difference as small as the one found. Where the means are on the other side, more seeds would not help: that takes a
longer training of larger models, in which the detector and its branches come to their limits.
"""


def table(rows: list[dict]) -> str:
    return tabulate(rows, headers="keys", tablefmt="github", disable_numparse=True)


def page_text(results: Results, costs: list[dict], folder: str, has_picture: Callable[[str], bool]) -> str:
    """The page as Markdown.

    Args:
        results: of all runs.
        costs: rows of the models' costs; may be empty.
        folder: where the pictures are, relative to the page.
        has_picture: (file name) -> whether there is such a picture.
    """
    claims = [claim for build in CLAIMS if (claim := build(results)).comparisons]
    parts = [INTRODUCTION, "## What holds\n", table([_summary(i, x) for i, x in enumerate(claims, 1)]) + "\n"]
    parts += [_section(i, claim, folder, has_picture) for i, claim in enumerate(claims, 1)]
    if costs:
        parts += [_cost_section(costs, folder, has_picture)]
    parts.append(_how(results, folder))
    return "\n".join(parts)


def _summary(number: int, claim: Claim) -> dict:
    return {"": number, "the paper's claim": claim.title, "here": claim.verdict}


def _section(number: int, claim: Claim, folder: str, has_picture: Callable[[str], bool]) -> str:
    lines = [f"## {number}. {claim.title}\n", table(claim.rows) + "\n"]
    lines += [f"{textwrap.fill(claim.notes, WIDTH)}\n"] if claim.notes else []
    lines += [textwrap.fill(f"* {x}", WIDTH, subsequent_indent="  ") for x in claim.comparisons]
    lines += [f"\n![{what}]({folder}/{file})" for file, what in claim.pictures if has_picture(file)]
    return "\n".join([*lines, ""])


def _cost_section(costs: list[dict], folder: str, has_picture: Callable[[str], bool]) -> str:
    rows = []
    for x in costs:
        row = {"model": x["model"], "parameters in training": f"{x['parameters (M)']:.2f} M"}
        row["parameters at inference"] = f"{x['at inference (M)']:.2f} M"
        rows.append(row | {"FLOPs of a picture": f"{x['GFLOPs']:.3f} G"})
    text = f"## What inference costs\n\n{table(rows)}\n\nInference drops the auxiliary heads and their queries.\n"
    return text + (f"\n![Costs by part of the model]({folder}/cost.png)\n" if has_picture("cost.png") else "")


def _schedule(setting: Setting) -> str:
    return " ".join(f"`{key} {value}`" for key, value in zip(setting.opts[::2], setting.opts[1::2]) if value != "")


def _how(results: Results, folder: str) -> str:
    known = {x.setting for x in results.runs}
    machines = "; ".join(sorted({x.machine for x in results.runs}))
    all_settings = {run.setting.name: run.setting for plan in PLANS.values() for run in plan.runs}
    settings = {name: setting for name, setting in all_settings.items() if name in known}
    rows = []
    for name, setting in settings.items():
        runs = [x for x in results.runs if x.setting == name]
        row = {"": setting.title, "config": f"`{setting.config_file}`", "changed": _schedule(setting)}
        rows.append(row | {"runs": len(runs), "seeds": len({x.seed for x in runs})})
    text = (
        f"Trained and measured on {machines}. The seed decides on the first weights of all but the backbone, on "
        "the order of the pictures, and on what is drawn at random. Measurements are made on the whole test set. "
        "Pictures of models show those of the first seed. The numbers of every run: "
        f"[results.json]({folder}/results.json). "
        "[Analyse](analysis.md) says what each measurement is."
    )
    return f"""\
## How it was made

```bash
make reproduce         # all of the digits' Co-Deformable-DETR
make reproduce-more    # K = 0 and 2 of the other data and detectors
```

{table(rows)}

{textwrap.fill(text, WIDTH)}
"""


def write_page(page: Path, results: Results, costs: list[dict]) -> None:
    """Write the page. Its pictures are in the folder of the same name."""
    folder = page.with_suffix("")
    page.parent.mkdir(parents=True, exist_ok=True)
    page.write_text(page_text(results, costs, folder.name, lambda name: (folder / name).is_file()))
