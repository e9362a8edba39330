"""Make every measurement on a finished run: ``python -m reproduction.measurements FOLDER`` for one, as a process of its
own, and the pictures that show several.
"""

import argparse
import json
from collections.abc import Sequence
from pathlib import Path

from PIL import Image

import codetr_d2  # noqa: F401 (registers the model)
from benchmarks.machine import describe_machine
from codetr_d2.analysis import plots
from codetr_d2.analysis.attention import measure_attention
from codetr_d2.analysis.branches import DETECTOR, measure_branches
from codetr_d2.analysis.conflict import measure_conflict
from codetr_d2.analysis.cost import compare_costs
from codetr_d2.analysis.discriminability import measure_discriminability
from codetr_d2.analysis.matches import FILE_NAME, Matches
from codetr_d2.analysis.models import AnalysedModel, ModelSpec, load_model, load_models
from codetr_d2.analysis.queries import measure_queries
from codetr_d2.analysis.stability import instability
from codetr_d2.checkpoint.checkpointer import atomic_write
from codetr_d2.engine.metrics_file import read_metrics

from .plans import ABLATIONS, Run
from .results import Results, RunResult

__all__ = ["MEASURED", "draw_pictures", "measure", "result_of"]

NUM_IMAGES = 80  # of the test set, for every measurement
MEASURED = "measurements.json"  # in a run's folder
COST_SIZE = (128, 128)  # pixels; the digits'


def measure(folder: Path, has_detector: bool) -> dict:
    """All measurements of a finished run, as fields of :class:`RunResult`; their pictures come into ``analysis``."""
    output = folder / "analysis"
    output.mkdir(exist_ok=True)
    model = load_model(folder.parent.name, str(folder / "config.yaml"), str(folder / "model_final.pth"))
    models: list[AnalysedModel] = [model]
    metrics = read_metrics(folder)
    # An evaluation at iteration i comes after i + 1 of them, but for the last.
    last = metrics[-1]["iteration"]
    curve = {min(x["iteration"] + 1, last): x["bbox/AP"] for x in metrics if "bbox/AP" in x}
    fields = {"ap_by_iteration": list(curve.items())}
    if model.model.auxiliary_heads:
        branches = measure_branches(models, NUM_IMAGES, output)
        fields["branches"] = {x["branch"]: x["AP_with_NMS"] for x in branches if x["branch"] != DETECTOR}
    if not has_detector:
        return fields
    areas = measure_discriminability(models, NUM_IMAGES, output)
    fields["discriminability"] = {x["source"]: x["area"] for x in areas}
    [area] = measure_attention(models, NUM_IMAGES, output)
    fields["attention"] = area["area"]
    fields["instability"] = [(i + 1, x) for i, x in instability(Matches.read(str(folder / FILE_NAME)))]
    if model.model.auxiliary_heads:
        fields["conflict"] = {}
        for x in measure_conflict(models, NUM_IMAGES, output):
            fields["conflict"].setdefault(x["head"], {})[x["to"]] = x["S_ij"]
        kept = ("positives per object", "positive distance", "negative distance")
        fields["queries"] = {
            x["head"]: {key: x[key] for key in kept} for x in measure_queries(models, NUM_IMAGES, output)
        }
    return fields


def result_of(run: Run, folder: Path) -> RunResult:
    """The numbers of a run that has been measured."""
    fields = json.loads((folder / MEASURED).read_text())
    place = {"setting": run.setting.name, "experiment": run.experiment.name, "seed": run.seed}
    return RunResult(**place, machine=machine_text(), **fields)


def machine_text() -> str:
    machine = describe_machine("cpu", threads=1)
    features = ", ".join(machine["cpu_features"])
    return f"{machine['cores']} cores of a CPU with {features}, one thread for each run, torch {machine['torch']}"


def draw_pictures(runs: Sequence[Run], output: Path, results: Results, pictures: Path) -> list[dict]:
    """Draw what shows several runs, from the first seed's models, and means over the seeds of all.

    Args:
        runs: of one setting, measured.
        output: where their folders are.
        results: the numbers of all runs.
        pictures: a folder for PNG files; it is made.

    Returns:
        The rows of :func:`compare_costs` of the plain detector and those with auxiliary heads, whole models alone.
    """
    folders = {run.experiment.name: output / run.name for run in runs if run.seed == 1}
    labels = {x.name: x.label for x in ABLATIONS}

    def specs(names: Sequence[str]) -> list[ModelSpec]:
        found = [(labels[x].partition(":")[0], folders[x]) for x in names if x in folders]
        return [ModelSpec(name, str(folder / "config.yaml"), str(folder / "model_final.pth")) for name, folder in found]

    temporary = output / "pictures"
    temporary.mkdir(parents=True, exist_ok=True)
    pictures.mkdir(parents=True, exist_ok=True)
    compared, with_heads = ["k0", "k2"], ["k2", "k6"]
    measure_discriminability(load_models(specs(compared)), NUM_IMAGES, temporary)
    measure_attention(load_models(specs(compared)), NUM_IMAGES, temporary)
    measure_branches(load_models(specs([*compared, "k6"])), NUM_IMAGES, temporary)
    measure_conflict(load_models(specs(with_heads)), NUM_IMAGES, temporary)
    measure_queries(load_models(specs(["k2"])), NUM_IMAGES, temporary)
    costs = compare_costs(specs([*compared, "k6"]), (), COST_SIZE, 5, 1, temporary)

    setting = runs[0].setting.name
    seeds = len({x.seed for x in runs})
    title = runs[0].setting.title + (f", mean over {seeds} seeds" if seeds > 1 else "")
    for name, what, of in (
        ("ap_by_iteration", "box AP on the test set, in percent", lambda x: x.ap_by_iteration),
        ("stability", "queries of an image that changed their object\nsince the evaluation before (IS)", _instability),
    ):
        lines = []
        for experiment in ("k0", "k2_heads_only", "k2_queries_only", "k2", "k6"):
            curves = [of(x) for x in results.of(setting, experiment)]
            if curves:
                points = [(i, sum(curve[j][1] for curve in curves) / len(curves)) for j, (i, _) in enumerate(curves[0])]
                lines.append(plots.Line(labels[experiment], *zip(*points)))
        plots.draw_lines(temporary / f"{name}.png", lines, title=title, x_label="iterations trained", y_label=what)
    aps = {x.label: results.values(setting, x.name, lambda run: run.ap) for x in ABLATIONS if not x.branch}
    plots.draw_dots(
        temporary / "ap.png",
        {label: values for label, values in aps.items() if values},
        title=f"{runs[0].setting.title}\na dot for each seed, a line for their mean",
        x_label="box AP on the test set, in percent",
    )
    for file in temporary.glob("*.png"):
        with Image.open(file) as image:  # in 256 colours, as the repository keeps them
            image.convert("RGB").quantize(256).save(pictures / file.name, optimize=True)
    return [x for x in costs if x["module"] == "all"]


def _instability(run: RunResult) -> list[tuple[int, float]]:
    return run.instability


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("folder", type=Path)
    parser.add_argument("--branch", action="store_true", help="there is no detector")
    args = parser.parse_args()
    fields = measure(args.folder, has_detector=not args.branch)
    content = json.dumps(fields).encode()
    atomic_write(str(args.folder / MEASURED), lambda file: file.write(content))


if __name__ == "__main__":
    main()
