"""Which query is matched with which object, evaluation by evaluation of a training: the file ``matches.json``."""

import json
import os
from dataclasses import dataclass, field

import torch
from torch import nn

from ..checkpoint.checkpointer import atomic_write
from ..errors import InputError
from ..modeling.structures import Targets

__all__ = ["FILE_NAME", "Matches", "match_objects"]

FILE_NAME = "matches.json"


@torch.no_grad()
def match_objects(model: nn.Module, model_input: dict) -> list[int]:
    """Match the last decoder layer's predictions for one image one to one, as the training does.

    Args:
        model: in eval mode.
        model_input: as the model takes it, with ``instances``: ``gt_boxes`` (xyxy in pixels of ``image``) and
            ``gt_classes``.

    Returns:
        The index of the matching query that each object gets, -1 for none.
    """
    memory = model.encode(model.features(model.preprocess([model_input])))
    output = model.predict(memory)
    targets = Targets([model_input["instances"].to(model.device)], memory.geometry.image_sizes_xyxy)
    matcher = model.query_head.criterion.matcher
    cost = matcher.cost(output.logits[-1:], output.boxes[-1:], targets.labels, targets.boxes, targets.image_sizes_xyxy)
    return matcher.match([cost], targets.num_targets)[0][0, 0].tolist()


@dataclass
class Matches:
    """The matches of the same images at several evaluations of a training.

    Attributes:
        image_ids: of the images.
        evaluations: for each evaluation its iteration, and for each image what :func:`match_objects` gives; by rising
            iteration.
    """

    image_ids: list[int | str]
    evaluations: list[tuple[int, list[list[int]]]] = field(default_factory=list)

    @classmethod
    def read(cls, path: str) -> "Matches":
        """
        Raises:
            InputError: there is no such file, or it is another one.
        """
        try:
            with open(path, encoding="utf-8") as file:
                data = json.load(file)
            evaluations = [(x["iteration"], x["queries_of_objects"]) for x in data["evaluations"]]
            return cls(data["image_ids"], evaluations)
        except OSError as error:
            raise InputError(
                f"{path}: {error.strerror}. A training writes it with the options TEST.STABILITY_IMAGES 100 and "
                "TEST.EVAL_PERIOD"
            ) from None
        except (ValueError, KeyError, TypeError):
            raise InputError(f"{path} holds no matches of a training; name the OUTPUT_DIR of one") from None

    def write(self, path: str) -> None:
        """
        Raises:
            InputError: the disk is full or broken; what was there is still there.
        """
        evaluations = [{"iteration": x, "queries_of_objects": queries} for x, queries in self.evaluations]
        content = json.dumps({"image_ids": self.image_ids, "evaluations": evaluations}).encode()
        atomic_write(path, lambda file: file.write(content))

    @classmethod
    def resume(cls, path: str, image_ids: list[int | str], iteration: int) -> "Matches":
        """The matches before ``iteration``, from which on a training goes on; none where it starts or has no file.

        Raises:
            InputError: those in the file are of other images.
        """
        if iteration == 0 or not os.path.isfile(path):
            return cls(image_ids)
        before = cls.read(path)
        if before.image_ids != image_ids:
            raise InputError(
                f"{path} has the matches of {len(before.image_ids)} images, which are not the {len(image_ids)} of now; "
                "set TEST.STABILITY_IMAGES and DATASETS.TEST as they were, or delete the file"
            )
        return cls(image_ids, [x for x in before.evaluations if x[0] < iteration])
