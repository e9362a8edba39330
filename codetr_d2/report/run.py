"""The output folder of a run: its config, its metrics and its detections."""

import json
import logging
from dataclasses import dataclass
from pathlib import Path

from detectron2.config import CfgNode
from detectron2.evaluation import inference_on_dataset

from ..analysis.models import load_model
from ..config.config_file import load_config
from ..data import CoDETRDatasetMapper, class_names, load_datasets, register_datasets
from ..data.annotations import AnnotatedImages
from ..data.datasets import annotated_images
from ..data.loader import build_test_loader
from ..engine.metrics_file import read_metrics
from ..errors import InputError, named_disk_problems
from ..evaluation.evaluator import DetectionEvaluator, Style, distinct_names, evaluation_style

__all__ = ["Run", "read_run"]

logger = logging.getLogger(__name__)


@dataclass
class Run:
    """A run as its output folder has it.

    Attributes:
        folder: the output folder.
        cfg: its config.
        dataset_name: the last dataset of ``DATASETS.TEST``, whose detections an evaluation leaves in the folder.
        dataset: its images and annotations.
        class_names: by class index, all different.
        style: how the dataset is evaluated.
        results: the detections in COCO's format of results, with class indices as ``category_id``.
        metrics: what metrics.json says of each iteration, in order; empty where there is none.
        weights: the weights of the run; None where they are gone.
    """

    folder: Path
    cfg: CfgNode
    dataset_name: str
    dataset: AnnotatedImages
    class_names: list[str]
    style: Style
    results: list[dict]
    metrics: list[dict]
    weights: Path | None


def read_run(folder: Path) -> Run:
    """Read a run. Where its folder holds no detections, its weights make them, and the folder keeps them.

    Paths in the config are relative to where this is called, as for training.

    Raises:
        InputError: there is no config; the dataset has no boxes or is not that of the detections; there are neither
            detections nor weights.
    """
    if not (folder / "config.yaml").is_file():
        raise InputError(f"{folder}: there is no config.yaml; name the OUTPUT_DIR of a training run")
    cfg = load_config(str(folder / "config.yaml"))
    register_datasets(cfg)
    if not cfg.DATASETS.TEST:
        raise InputError(f"{folder / 'config.yaml'}: DATASETS.TEST names no dataset; the report is about one")
    name = cfg.DATASETS.TEST[-1]
    dataset, style = annotated_images(name, cfg.MODEL.CODETR.NUM_CLASSES), evaluation_style(name)
    if all(x["iscrowd"] for record in dataset.records for x in record["annotations"]):
        raise InputError(f"{dataset.source} has no boxes to compare detections with; name another in DATASETS.TEST")
    weights = _weights(folder)
    file = folder / "inference" / f"{style}_instances_results.json"
    if not file.is_file():
        _detect(folder, name, weights)
    number = cfg.MODEL.CODETR.NUM_CLASSES
    names = distinct_names(dataset.categories) or class_names(cfg) or [str(i) for i in range(number)]
    return Run(
        folder=folder,
        cfg=cfg,
        dataset_name=name,
        dataset=dataset,
        class_names=names,
        style=style,
        results=_read_results(file, dataset, len(names)),
        metrics=read_metrics(folder),
        weights=weights,
    )


def _weights(folder: Path) -> Path | None:
    """The final weights, or the last checkpoint of a run that goes on or was interrupted."""
    last = folder / "last_checkpoint"
    for name in ("model_final.pth", last.read_text().strip() if last.is_file() else ""):
        if name and (folder / name).is_file():
            return folder / name
    return None


def _detect(folder: Path, dataset_name: str, weights: Path | None) -> None:
    """Evaluate the weights on the dataset, which writes the detections into the folder."""
    if weights is None:
        raise InputError(
            f"{folder}: there are neither detections (inference/) nor weights (model_final.pth); name the OUTPUT_DIR "
            "of a run that has been trained"
        )
    logger.info("%s holds no detections of %s; %s makes them", folder, dataset_name, weights)
    analysed = load_model("report", str(folder / "config.yaml"), str(weights))
    cfg = analysed.cfg
    records = load_datasets(cfg, [dataset_name], is_train=False)
    loader = build_test_loader(cfg, records, CoDETRDatasetMapper(cfg, False))
    with named_disk_problems(str(folder)):
        inference_on_dataset(analysed.model, loader, DetectionEvaluator(dataset_name, str(folder / "inference")))


def _read_results(file: Path, dataset: AnnotatedImages, num_classes: int) -> list[dict]:
    """Detections with class indices.

    Raises:
        InputError: the file is damaged, or of another dataset.
    """
    mend = "delete the file, and the weights of the run make it anew; or evaluate the run with --eval-only"
    index_of = {x["id"]: i for i, x in enumerate(dataset.categories)} or {i: i for i in range(num_classes)}
    images = {x["image_id"] for x in dataset.records}
    try:
        results = json.loads(file.read_text())
        for x in results:
            if x["image_id"] not in images or x["category_id"] not in index_of:
                raise InputError(
                    f"{file}: image {x['image_id']} or category {x['category_id']} is not in {dataset.source}, so that "
                    f"the detections are of another dataset; {mend}"
                )
        return [{**x, "category_id": index_of[x["category_id"]]} for x in results]
    except (ValueError, TypeError, KeyError) as error:
        if isinstance(error, InputError):
            raise
        raise InputError(f"{file}: these are no detections in COCO's format of results; {mend}") from error
