"""The output folder of a run with masks, whose model has learnt nothing and whose detections are made up."""

import json
import shutil

import numpy as np
from PIL import Image

from tests.report.random_case import SIZE, make_case
from tests.tiny_run import write_tiny_run

CLASS_NAMES = ["cat", "dog", "</script><b>x", "nothing"]


def write_tiny_report_run(folder):
    """Write ``folder/run`` with a config, metrics, detections and weights, and its dataset into ``folder/data``.

    Returns:
        The path of the run.
    """
    data, detections = make_case(0, num_detections=30)
    data_folder = folder / "data"
    for category, text in zip(data["categories"], CLASS_NAMES):
        category["name"] = text
    (data_folder / "images").mkdir(parents=True)
    for i, image in enumerate(data["images"]):
        pixels = np.random.default_rng(i).integers(0, 255, (SIZE, SIZE, 3), dtype=np.uint8)
        Image.fromarray(pixels).save(data_folder / "images" / image["file_name"])
    annotation_file = data_folder / "truth.json"
    annotation_file.write_text(json.dumps(data))
    triples = [[f"{data_folder}_{x}", str(data_folder / "images"), str(annotation_file)] for x in ("train", "test")]
    run = folder / "run"
    opts = ("MODEL.CODETR.NUM_CLASSES", 4, "MODEL.CODETR.CLASS_NAMES", CLASS_NAMES, "MODEL.DEVICE", "cpu")
    write_tiny_run(run, triples, opts)
    (run / "inference").mkdir()
    (run / "inference" / "coco_instances_results.json").write_text(json.dumps(detections))
    lines = [
        {
            "iteration": i,
            "total_loss": 9.0 / (i + 1),
            "loss_cls": 3.0 / (i + 1),
            "loss_cls_0": 4.0 / (i + 1),
            "lr": 0.1,
            "time": 0.5,
            "grad_norm": 2.0,
        }
        for i in range(0, 40, 10)
    ]
    lines.append({"iteration": 40, "bbox/AP": 20.0, "segm/AP": None})
    (run / "metrics.json").write_text("".join(json.dumps(x) + "\n" for x in lines))
    return run


def copy_with_other_scores(run, folder, seed):
    """Copy a run to ``folder``, whose detections get random scores."""
    shutil.copytree(run, folder)
    file = folder / "inference" / "coco_instances_results.json"
    rng = np.random.default_rng(seed)
    file.write_text(json.dumps([{**x, "score": float(rng.random())} for x in json.loads(file.read_text())]))
    return folder
