"""Evaluation of detections whose masks have scores of their own."""

from detectron2.structures import Instances

__all__ = ["MaskScores", "add_mask_scores"]


def add_mask_scores(results: list[dict], detections: Instances) -> None:
    """Put the ``mask_scores`` of detections, where there are some, as ``mask_score`` into their COCO format.

    Args:
        results: what detectron2's ``instances_to_coco_json`` makes of the detections; changed in place.
        detections: with or without ``mask_scores``.
    """
    if detections.has("mask_scores"):
        for result, score in zip(results, detections.mask_scores.tolist()):
            result["mask_score"] = score


class MaskScores:
    """For COCO's or LVIS's evaluator of detectron2: masks are ranked by ``mask_scores``, boxes by ``scores``.

    The results file has the former as ``mask_score`` beside the latter. It changes nothing where the model gives none.
    """

    def process(self, inputs: list[dict], outputs: list[dict]) -> None:
        """See the base class."""
        super().process(inputs, outputs)
        for prediction, output in zip(self._predictions[-len(outputs) :], outputs):
            add_mask_scores(prediction["instances"], output["instances"])

    def _eval_predictions(self, predictions: list[dict], *args, **kwargs) -> None:
        results = [x for prediction in predictions for x in prediction["instances"]]
        if not any("mask_score" in x for x in results):
            super()._eval_predictions(predictions, *args, **kwargs)
            return
        own_tasks = self._tasks
        # Boxes come last, as the results file is written each time.
        for task in sorted(own_tasks or self._tasks_from_predictions(results), reverse=True):
            score = "mask_score" if task == "segm" else "score"
            # Copies, as the base class changes them.
            ranked = [{**p, "instances": [{**x, "score": x[score]} for x in p["instances"]]} for p in predictions]
            self._tasks = [task]
            super()._eval_predictions(ranked, *args, **kwargs)
        self._tasks = own_tasks
        if "segm" in self._results:
            self._results.move_to_end("segm")
