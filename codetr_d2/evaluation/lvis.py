"""LVIS's AP (Gupta et al., CVPR 2019, section 2), computed with pycocotools."""

import contextlib
import io
import itertools
import json
import logging
import os
from collections import defaultdict

import numpy as np
from detectron2.evaluation import COCOEvaluator
from detectron2.utils.file_io import PathManager
from detectron2.utils.logger import create_small_table
from pycocotools.coco import COCO
from pycocotools.cocoeval import COCOeval

__all__ = ["LVISEvaluator", "lvis_ap"]

logger = logging.getLogger(__name__)

MAX_DETECTIONS = 300  # of each image, over all categories, as in LVIS's challenges
NAMES = ("AP", "AP50", "AP75", "APs", "APm", "APl", "APr", "APc", "APf")
FREQUENCIES = ("r", "c", "f")  # rare, common, frequent: the "frequency" of a category


class _CategoryEval(COCOeval):
    """One category. Where an image's annotation of it is not exhaustive, unmatched detections are no errors."""

    not_exhaustive: set[int] = frozenset()  # ids of such images

    def evaluateImg(self, imgId, catId, aRng, maxDet):
        result = super().evaluateImg(imgId, catId, aRng, maxDet)
        if result is not None and imgId in self.not_exhaustive:
            result["dtIgnore"] = np.logical_or(result["dtIgnore"], result["dtMatches"] == 0)
        return result


def lvis_ap(ground_truth: COCO, detections: list[dict], task: str) -> dict[str, float]:
    """LVIS's average precisions in percent, NaN where there is nothing to find.

    A category is evaluated on the images where it is annotated or known to be absent (``neg_category_ids``) alone. No
    detection counts against ``not_exhaustive_category_ids``.

    Args:
        ground_truth: a file in LVIS's format, with ``iscrowd`` in its annotations.
        detections: in COCO's format, with the category ids of the file.
        task: "bbox" or "segm".

    Returns:
        ``AP``, at IoU thresholds ``AP50``, ``AP75``, by area ``APs``, ``APm``, ``APl``, and by the frequency of the
        category ``APr``, ``APc``, ``APf``.
    """
    by_image = defaultdict(list)
    for detection in detections:
        by_image[detection["image_id"]].append(detection)
    best = [sorted(x, key=lambda d: d["score"], reverse=True)[:MAX_DETECTIONS] for x in by_image.values()]
    kept = [  # copies, as pycocotools changes them; without the box, it takes the area of the mask
        {k: v for k, v in x.items() if k != "bbox" or task == "bbox"} for x in itertools.chain.from_iterable(best)
    ]
    results = ground_truth.loadRes(kept) if kept else COCO()  # loadRes takes no empty list

    images, not_exhaustive = defaultdict(set), defaultdict(set)  # of each category
    for annotation in ground_truth.anns.values():
        images[annotation["category_id"]].add(annotation["image_id"])
    for image in ground_truth.imgs.values():
        for category in image["neg_category_ids"]:
            images[category].add(image["id"])
        for category in image["not_exhaustive_category_ids"]:
            not_exhaustive[category].add(image["id"])

    precisions, frequencies = [], []
    for category_id, category in ground_truth.cats.items():
        if not images[category_id]:
            continue
        evaluation = _CategoryEval(ground_truth, results, task)
        evaluation.not_exhaustive = not_exhaustive[category_id]
        evaluation.params.catIds = [category_id]
        evaluation.params.imgIds = sorted(images[category_id])
        evaluation.params.maxDets = [MAX_DETECTIONS]
        evaluation.evaluate()
        evaluation.accumulate()
        precisions.append(evaluation.eval["precision"][:, :, 0, :, 0])
        frequencies.append(category["frequency"])
    if not precisions:  # nothing is annotated, nor known to be absent
        return dict.fromkeys(NAMES, float("nan"))
    precision, frequencies = np.stack(precisions), np.array(frequencies)  # [categories, thresholds, recalls, areas]

    def mean(values: np.ndarray) -> float:
        values = values[values > -1]
        return float(values.mean() * 100) if values.size else float("nan")

    ap = {"AP": mean(precision[..., 0])}
    ap["AP50"], ap["AP75"] = mean(precision[:, 0, :, 0]), mean(precision[:, 5, :, 0])  # thresholds 0.5, 0.55, ... 0.95
    ap.update({f"AP{area}": mean(precision[..., i]) for i, area in enumerate("sml", 1)})
    ap.update({f"AP{frequency}": mean(precision[frequencies == frequency][..., 0]) for frequency in FREQUENCIES})
    return ap


class LVISEvaluator(COCOEvaluator):
    """detectron2's ``COCOEvaluator`` with LVIS's average precisions, for datasets that :func:`load_lvis` has loaded.

    It needs no ``lvis`` package, which detectron2's own does: that one does not run with today's numpy.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        for annotation in self._coco_api.anns.values():  # what pycocotools asks for; LVIS has no crowds
            annotation["iscrowd"] = 0

    def _eval_predictions(self, predictions: list[dict], img_ids=None) -> None:
        detections = list(itertools.chain.from_iterable(x["instances"] for x in predictions))
        dataset_id = {i: x for x, i in self._metadata.thing_dataset_id_to_contiguous_id.items()}
        for detection in detections:
            detection["category_id"] = dataset_id[detection["category_id"]]
        if self._output_dir:
            with PathManager.open(os.path.join(self._output_dir, "lvis_instances_results.json"), "w") as file:
                json.dump(detections, file)
        if not self._do_evaluation:
            logger.info("The dataset has no annotations to evaluate with.")
            return
        for task in sorted(self._tasks or self._tasks_from_predictions(detections)):
            with contextlib.redirect_stdout(io.StringIO()):
                self._results[task] = lvis_ap(self._coco_api, detections, task)
            logger.info("LVIS evaluation of %s:\n%s", task, create_small_table(self._results[task]))
