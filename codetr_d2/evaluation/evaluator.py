"""COCO's and LVIS's average precisions, computed by faster-coco-eval, of the datasets as this project reads them."""

import itertools
import json
import logging
import os
from collections import OrderedDict, defaultdict
from typing import Literal

import numpy as np
import torch
from detectron2.data import MetadataCatalog
from detectron2.evaluation import DatasetEvaluator
from detectron2.evaluation.coco_evaluation import instances_to_coco_json
from detectron2.structures import Instances
from detectron2.utils import comm
from detectron2.utils.logger import create_small_table
from faster_coco_eval import COCO, COCOeval_faster
from tabulate import tabulate

from ..checkpoint.checkpointer import atomic_write
from ..data.annotations import AnnotatedImages
from ..data.datasets import annotated_images
from ..errors import InputError
from .mask_encoding import encode_mask

__all__ = [
    "DetectionEvaluator",
    "average_precisions",
    "distinct_names",
    "evaluation_style",
    "precisions",
    "to_coco_results",
]

logger = logging.getLogger(__name__)

Style = Literal["coco", "lvis"]
# Detections of each image that count: of each category, as on COCO's server, or of all together, as on LVIS's.
MAX_DETECTIONS = {"coco": 100, "lvis": 300}
FREQUENCIES = ("r", "c", "f")  # of LVIS's categories: rare, common, frequent


def evaluation_style(dataset_name: str) -> Style:
    """How a dataset asks to be evaluated: its ``evaluator_type``, or as COCO where it names none.

    Raises:
        InputError: it asks for an evaluator that does not exist here.
    """
    style = MetadataCatalog.get(dataset_name).get("evaluator_type") or "coco"
    if style not in MAX_DETECTIONS:
        raise InputError(
            f"DATASETS.TEST: {dataset_name} asks for the evaluator {style!r}; there are: {', '.join(MAX_DETECTIONS)}. "
            "Convert the dataset to COCO's format and describe it in DATASETS.COCO_JSON"
        )
    return style


def to_coco_results(detections: Instances, image_id: int | str) -> list[dict]:
    """Detections of an image on the CPU in COCO's format of results, with ``category_id`` as class index.

    Masks (``pred_masks``) must lie in their boxes, as detectron2 pastes them. Where they have scores of their own
    (``mask_scores``), each result has its as ``mask_score``.
    """
    fields = {key: value for key, value in detections.get_fields().items() if key != "pred_masks"}
    results = instances_to_coco_json(Instances(detections.image_size, **fields), image_id)
    if detections.has("pred_masks"):
        boxes = detections.pred_boxes.tensor.tolist()
        for result, mask, box in zip(results, detections.pred_masks.numpy(), boxes):
            result["segmentation"] = encode_mask(mask, box)
    if detections.has("mask_scores"):
        for result, score in zip(results, detections.mask_scores.tolist()):
            result["mask_score"] = score
    return results


class DetectionEvaluator(DatasetEvaluator):
    """Average precision of boxes and masks, by the annotations that :func:`annotated_images` gives.

    Masks are ranked by ``mask_scores`` where the model gives them. Detections are written to ``output_dir``, with the
    ids of the annotation file, in COCO's format of results; that of a test set without annotations can be submitted.

    Args:
        dataset_name: of a registered dataset. Its ``evaluator_type`` "lvis" asks for LVIS's rules: a category counts on
            images where it is annotated or known to be absent alone, no detection counts against categories that are
            not annotated exhaustively, and there are means over rare, common and frequent categories.
        output_dir: folder for the detections; None: none are written.
    """

    def __init__(self, dataset_name: str, output_dir: str | None = None):
        self.dataset_name = dataset_name
        self.output_dir = output_dir
        self.style = evaluation_style(dataset_name)
        self.reset()

    def reset(self) -> None:
        self._results: list[dict] = []
        self._has_masks = False

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """
        Args:
            inputs: the model's inputs, with ``image_id``.
            outputs: dicts with ``instances``, as the model returns them.
        """
        for x, output in zip(inputs, outputs):
            detections = output["instances"].to(torch.device("cpu"))
            self._has_masks |= detections.has("pred_masks")
            self._results += to_coco_results(detections, x["image_id"])

    def evaluate(self) -> OrderedDict:
        """The results of all processes, on the main process; empty on others, and without annotations.

        Returns:
            For "bbox", and "segm" where there are masks, what :func:`average_precisions` gives.
        """
        gathered = comm.gather((self._results, self._has_masks), dst=0)
        if not comm.is_main_process():
            return OrderedDict()
        results = list(itertools.chain.from_iterable(x for x, _ in gathered))
        has_masks = any(x for _, x in gathered)
        dataset = annotated_images(self.dataset_name)
        path = self._write(dataset, results) if self.output_dir else "nowhere"
        metrics = OrderedDict()
        if not dataset.is_annotated:
            logger.info("%s has no annotations to evaluate with; its detections are in %s", self.dataset_name, path)
            return metrics
        if not results:
            logger.warning("%s: the model has detected nothing at all", self.dataset_name)
        for task in ("bbox", "segm")[: 2 if has_masks else 1]:
            metrics[task] = average_precisions(dataset, results, task, self.style)
            overall = {key: value for key, value in metrics[task].items() if not key.startswith("AP-")}
            logger.info("%s, %s:\n%s", self.dataset_name, task, create_small_table(overall))
            classes = [(key.removeprefix("AP-"), x) for key, x in metrics[task].items() if key.startswith("AP-")]
            if classes:
                logger.info("%s, %s AP of each class:\n%s", self.dataset_name, task, _class_table(classes))
        return metrics

    def _write(self, dataset: AnnotatedImages, results: list[dict]) -> str:
        os.makedirs(self.output_dir, exist_ok=True)
        path = os.path.join(self.output_dir, f"{self.style}_instances_results.json")
        ids = {i: x["id"] for i, x in enumerate(dataset.categories)}
        written = [{**x, "category_id": ids.get(x["category_id"], x["category_id"])} for x in results]
        atomic_write(path, lambda file: file.write(json.dumps(written).encode()))
        return path


def average_precisions(
    dataset: AnnotatedImages, results: list[dict], task: Literal["bbox", "segm"], style: Style
) -> dict[str, float]:
    """Average precisions in percent; NaN where there is nothing to find.

    Args:
        dataset: the ground truth.
        results: detections in COCO's format of results, with the dataset's image ids, and class indices as
            ``category_id``.
        task: by which overlap objects are found.
        style: see :class:`DetectionEvaluator`.

    Returns:
        ``AP``, at IoU thresholds ``AP50``, ``AP75``, by area ``APs``, ``APm``, ``APl``; with COCO's style ``AP-name``
        of each class where there are several, with LVIS's ``APr``, ``APc``, ``APf`` by the frequency of the category.
    """
    precision = precisions(dataset, results, task, style)

    def mean(values: np.ndarray) -> float:
        values = values[values > -1]
        return float(values.mean() * 100) if values.size else float("nan")

    ap = {"AP": mean(precision[..., 0])}
    ap["AP50"], ap["AP75"] = mean(precision[0, :, :, 0]), mean(precision[5, :, :, 0])
    ap.update({f"AP{area}": mean(precision[..., i]) for i, area in enumerate("sml", 1)})
    if style == "lvis":
        frequencies = np.array([x["frequency"] for x in dataset.categories])
        ap.update({f"AP{x}": mean(precision[:, :, frequencies == x, 0]) for x in FREQUENCIES})
    elif len(dataset.categories) > 1:
        names = distinct_names(dataset.categories)
        ap.update({f"AP-{name}": mean(precision[:, :, i, 0]) for i, name in enumerate(names)})
    return ap


def precisions(
    dataset: AnnotatedImages, results: list[dict], task: Literal["bbox", "segm"], style: Style
) -> np.ndarray:
    """[T, R, K, A] precision at each IoU threshold 0.5, 0.55, ... 0.95, recall 0, 0.01, ... 1, class, and area: all,
    small, medium, large. -1 where there is nothing to find. Arguments as those of :func:`average_precisions`.
    """
    truth = COCO(_ground_truth(dataset, results, task))
    found = truth.loadRes(_detections(dataset, results, task, style))
    evaluation = COCOeval_faster(truth, found, task, lvis_style=style == "lvis", print_function=logger.debug)
    if style == "lvis":
        evaluation.params.maxDets = [MAX_DETECTIONS[style]]
    evaluation.evaluate()
    evaluation.accumulate()
    return evaluation.eval["precision"][..., -1]


def _class_table(classes: list[tuple[str, float]], columns: int = 3) -> str:
    rows = [list(itertools.chain.from_iterable(classes[i : i + columns])) for i in range(0, len(classes), columns)]
    headers = ["class", "AP"] * min(columns, len(classes))
    return tabulate(rows, headers, tablefmt="pipe", floatfmt=".3f", numalign="left")


def distinct_names(categories: list[dict]) -> list[str]:
    """The names of the classes, with their ids where several have one name."""
    names = [x["name"] for x in categories]
    return [f"{x['name']} (id {x['id']})" if names.count(x["name"]) > 1 else x["name"] for x in categories]


def _ground_truth(dataset: AnnotatedImages, results: list[dict], task: str) -> dict:
    """In COCO's format, with ids of our own: images, annotations and categories count from 1."""
    categories = dataset.categories
    if not categories:  # of a dataset that was registered without names
        indices = {x["category_id"] for record in dataset.records for x in record["annotations"]}
        indices |= {x["category_id"] for x in results}
        categories = [{"id": i, "name": str(i)} for i in range(max(indices, default=0) + 1)]
    number_of = {x["id"]: i for i, x in enumerate(categories, 1)}
    images, annotations = [], []
    for i, record in enumerate(dataset.records, 1):
        if task == "segm" and "height" not in record:
            raise InputError(f'{dataset.source}: {record["file_name"]} has no "height" and "width", which masks need.')
        image = {"id": i, "height": record.get("height"), "width": record.get("width")}
        for key in ("neg_category_ids", "not_exhaustive_category_ids"):
            image[key] = [number_of[x] for x in record.get(key, []) if x in number_of]
        images.append(image)
        for x in record["annotations"]:
            x = {**x, "id": len(annotations) + 1, "image_id": i, "category_id": x["category_id"] + 1}
            annotations.append(x)
    categories = [{**x, "id": i} for i, x in enumerate(categories, 1)]
    return {"info": {}, "images": images, "annotations": annotations, "categories": categories}


def _detections(dataset: AnnotatedImages, results: list[dict], task: str, style: Style) -> list[dict]:
    """Results with the ids of :func:`_ground_truth`, those alone that count."""
    number_of = {x["image_id"]: i for i, x in enumerate(dataset.records, 1)}
    shape, score = ("segmentation", "mask_score") if task == "segm" else ("bbox", "score")
    found = [
        {
            "image_id": number_of[x["image_id"]],
            "category_id": x["category_id"] + 1,
            shape: x[shape],
            "score": x.get(score, x["score"]),
        }
        for x in results
    ]
    if style == "coco":
        return found
    by_image = defaultdict(list)
    for x in found:
        by_image[x["image_id"]].append(x)
    best = [sorted(x, key=lambda d: d["score"], reverse=True)[: MAX_DETECTIONS[style]] for x in by_image.values()]
    return list(itertools.chain.from_iterable(best))
