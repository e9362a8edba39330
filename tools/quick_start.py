#!/usr/bin/env python
"""Train a small Co-DETR on this machine, evaluate it, and draw what it finds: what `make quickstart` runs.

    python tools/quick_start.py digits|nuclei|trees [--model MODEL] [--output DIR] [--fresh]

It prepares the dataset and the backbone's weights, runs train_net.py with the config of model and dataset in
configs/quick_start (all have a co_deformable_detr, digits and nuclei a co_dino, digits a co_conditional_detr and a
co_dab_detr), and writes report.html, predictions.png, curves.png and summary.json beside the checkpoints. An
interrupted run is gone on with; of a finished one, only the report is made anew, unless --fresh.
"""

import argparse
import itertools
import json
import math
import os
import shlex
import subprocess
import sys
import time
from pathlib import Path

import matplotlib

matplotlib.use("Agg")

sys.path.insert(0, str(Path(__file__).resolve().parent / "prepare"))

import prepare_digits
import prepare_efficientnet
import prepare_nuclei
import prepare_trees
from detectron2.config import CfgNode, get_cfg
from matplotlib import pyplot as plt
from tabulate import tabulate

from codetr_d2 import add_codetr_config
from codetr_d2.data import load_datasets, read_image, register_datasets
from codetr_d2.engine.metrics_file import is_finished, read_metrics
from codetr_d2.errors import InputError
from codetr_d2.inference import Predictor
from codetr_d2.report.run import read_run
from codetr_d2.report.run_page import write_run_page
from codetr_d2.visualization import draw_annotations, draw_predictions

ROOT = Path(__file__).resolve().parent.parent
PREPARE = {"digits": prepare_digits.prepare, "nuclei": prepare_nuclei.prepare, "trees": prepare_trees.prepare}
MODELS = ("co_deformable_detr", "co_dino", "co_conditional_detr", "co_dab_detr")
DATASETS = Path("datasets")
METRICS = ["AP", "AP50", "AP75", "APs", "APm", "APl"]
TASKS = {"bbox": "box", "segm": "mask"}  # the latter where the model has masks
NUM_PICTURES = 8
SCORE_THRESHOLD = 0.3  # least score of a prediction to be drawn
LONG_SIDE = 400  # pixels of a drawn picture


def set_aside(output: Path) -> None:
    """Rename an older run."""
    target = next(x for i in itertools.count(1) if not (x := output.with_name(f"{output.name}.{i}")).exists())
    output.rename(target)
    print(f"The older run is now in {target}.")


def train(config_file: Path, output: Path) -> float:
    """Run train_net.py, or go on with its interrupted run, and return the seconds that it took."""
    command = [sys.executable, "train_net.py", "--config-file", str(config_file)]
    command += ["--resume"] if output.exists() else []
    command += ["OUTPUT_DIR", str(output)]
    print(f"$ {shlex.join(command)}", flush=True)
    start = time.monotonic()
    code = subprocess.run(command).returncode
    if code != 0:
        sys.exit(f"error: the training stopped (exit code {code}); the lines above say why. Run this again to go on.")
    return time.monotonic() - start


def load_model(output: Path) -> tuple[CfgNode, Predictor]:
    """The trained model, as any user loads it."""
    cfg = get_cfg()
    add_codetr_config(cfg)
    cfg.merge_from_file(str(output / "config.yaml"))
    cfg.MODEL.WEIGHTS = str(output / "model_final.pth")
    return cfg, Predictor(cfg)


def draw_test_pictures(cfg: CfgNode, predictor: Predictor, file: Path) -> str:
    """Draw evenly spaced test pictures, predictions beside ground truth; return the file name of the first one."""
    register_datasets(cfg)
    dataset = load_datasets(cfg, cfg.DATASETS.TEST, is_train=False)
    number = min(NUM_PICTURES, len(dataset))
    chosen = [dataset[i * len(dataset) // number] for i in range(number)]
    names = cfg.MODEL.CODETR.CLASS_NAMES
    figure, axes = plt.subplots(math.ceil(len(chosen) / 2), 4, figsize=(16, 2.1 * len(chosen)), squeeze=False)
    for axis in axes.flat:
        axis.axis("off")
    for picture, (truth_axis, prediction_axis) in zip(chosen, axes.reshape(-1, 2)):
        image = read_image(picture["file_name"], "BGR")
        found = predictor(image)["instances"].to("cpu")
        found = found[found.scores >= SCORE_THRESHOLD]
        truth_axis.imshow(draw_annotations(image, picture["annotations"], names, LONG_SIDE))
        name = Path(picture["file_name"]).name
        name = name if len(name) <= 20 else f"...{name[-18:]}"  # all that fits over the picture
        truth_axis.set_title(f"{name}: ground truth", fontsize=10)
        prediction_axis.imshow(draw_predictions(image, found, names, LONG_SIDE))
        prediction_axis.set_title(f"prediction (score {SCORE_THRESHOLD} or more)", fontsize=10)
    figure.tight_layout()
    figure.savefig(file, dpi=100)
    plt.close(figure)
    return chosen[0]["file_name"]


def draw_curves(metrics: list[dict], file: Path) -> None:
    """Draw the loss and the AP over the iterations."""
    figure, (loss_axis, ap_axis) = plt.subplots(1, 2, figsize=(12, 4.5))
    losses = [(x["iteration"], x["total_loss"]) for x in metrics if "total_loss" in x]
    loss_axis.plot(*zip(*losses))
    loss_axis.set(xlabel="iteration", ylabel="total loss", title="training loss, all heads", yscale="log")
    for task, what in TASKS.items():
        for name in ("AP", "AP50"):
            points = [(x["iteration"], x[f"{task}/{name}"]) for x in metrics if f"{task}/{name}" in x]
            if points:
                ap_axis.plot(*zip(*points), "o-", label=f"{what} {name}")
    ap_axis.set(xlabel="iteration", ylabel="AP (%)", title="test set", ylim=(0, 100))
    ap_axis.legend()
    for axis in (loss_axis, ap_axis):
        axis.grid(alpha=0.3)
    figure.tight_layout()
    figure.savefig(file, dpi=120)
    plt.close(figure)


def write_report(output: Path) -> None:
    """The page of the run."""
    write_run_page([read_run(output)], output / "report.html")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("dataset", choices=sorted(PREPARE))
    parser.add_argument("--model", choices=MODELS, default=MODELS[0], help="default: %(default)s")
    parser.add_argument("--output", type=Path, help="folder of the run (default: output/quick_start/DATASET[_MODEL])")
    parser.add_argument("--fresh", action="store_true", help="train anew; an older run is renamed, not deleted")
    args = parser.parse_args()
    name = args.dataset if args.model == MODELS[0] else f"{args.dataset}_{args.model}"
    output = args.output.absolute() if args.output else ROOT / "output" / "quick_start" / name
    os.chdir(ROOT)  # the paths in the configs are relative to it
    output = Path(os.path.relpath(output)) if output.is_relative_to(ROOT) else output

    config_file = Path(f"configs/quick_start/{args.model}_efficientnet_lite0_{args.dataset}.yaml")
    if not config_file.is_file():
        raise InputError(f"--model {args.model}: there is no {config_file}")
    PREPARE[args.dataset](DATASETS / args.dataset)
    prepare_efficientnet.prepare(DATASETS / "weights" / "tf_efficientnet_lite0.pth")
    if args.fresh and output.exists():
        set_aside(output)

    summary_file = output / "summary.json"
    if is_finished(output):
        print(f"{output} holds a finished run: only the report is made anew. --fresh trains again.")
        before = json.loads(summary_file.read_text()) if summary_file.is_file() else {}
        seconds, resumed = before.get("train_and_evaluate_seconds"), before.get("resumed", True)
    else:
        resumed = (output / "last_checkpoint").is_file()
        seconds = round(train(config_file, output), 1)

    cfg, predictor = load_model(output)
    picture = draw_test_pictures(cfg, predictor, output / "predictions.png")
    metrics = read_metrics(output)
    draw_curves(metrics, output / "curves.png")
    write_report(output)
    last = next(x for x in reversed(metrics) if "bbox/AP" in x)
    final = {
        what: {name: last[f"{task}/{name}"] for name in METRICS} for task, what in TASKS.items() if f"{task}/AP" in last
    }
    rounded = {
        what: {name: None if math.isnan(value) else round(value, 2) for name, value in values.items()}
        for what, values in final.items()
    }
    python = Path(sys.executable)
    python = python.relative_to(ROOT) if python.is_relative_to(ROOT) else python
    next_command = [str(python), "demo/predict.py", picture, "--output", str(output / "demo")]
    next_command += ["--config-file", str(output / "config.yaml")]
    summary = {
        "dataset": args.dataset,
        "AP": rounded["box"],
        **({"mask_AP": rounded["mask"]} if "mask" in rounded else {}),
        # With "resumed", the seconds are those of the last part of the run only.
        "train_and_evaluate_seconds": seconds,
        "resumed": resumed,
        "files": {
            "weights": str(output / "model_final.pth"),
            "config": str(output / "config.yaml"),
            "report": str(output / "report.html"),
            "predictions": str(output / "predictions.png"),
            "curves": str(output / "curves.png"),
            "log": str(output / "log.txt"),
        },
        "next_command": shlex.join(next_command),
    }
    unfinished = summary_file.with_suffix(".tmp")
    unfinished.write_text(json.dumps(summary, indent=2) + "\n")
    unfinished.replace(summary_file)

    for what, values in final.items():
        print(f"\n{what.capitalize()} AP on the test pictures of {args.dataset}, in percent:")
        row = [f"{values[name]:.1f}" for name in METRICS]
        print(tabulate([row], headers=METRICS, tablefmt="github", disable_numparse=True))
    if seconds is not None:
        part = " (the last part of the run)" if resumed else ""
        print(f"Training and evaluation took {seconds / 60:.1f} minutes{part}.")
    for what, file in summary["files"].items():
        print(f"{what:12} {file}")
    print(f"\nNext, detect something with the model you just trained:\n  {summary['next_command']}")


if __name__ == "__main__":
    try:
        main()
    except InputError as error:
        print(f"error: {error}", file=sys.stderr)
        sys.exit(2)
    except KeyboardInterrupt:
        print("interrupted; run this again to go on", file=sys.stderr)
        sys.exit(130)
