"""Customised queries: how many there are, where they are, and how far from the original ones (paper, section 3.2).

What an auxiliary head assigns an object to is a positive customised query; a background candidate is a negative one.
The paper keeps the positive ones alone, as the negative ones lie further from the queries of the detector itself. How
it computes their normalised average distance is not given; here it is :func:`distance_to_nearest`.
"""

from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.structures import Instances
from detectron2.utils.events import EventStorage
from torch import Tensor, nn
from tqdm import tqdm

from ..errors import InputError
from ..modeling.pyramid import FeaturePyramid
from ..modeling.structures import PositiveSamples
from . import plots
from .models import AnalysedModel, images
from .results import write_rows

__all__ = ["CustomisedQueries", "customised_queries", "distance_to_nearest", "measure_queries", "positives_of_objects"]

NUM_PICTURES = 3  # images whose queries are drawn
SEED = 0  # of what heads and this module draw at random


@dataclass
class CustomisedQueries:
    """The customised queries that an auxiliary head makes of an image. Boxes are xyxy in pixels of the network input.

    Attributes:
        positives: [P, 4] the coordinates of all candidates that it assigns an object to.
        target_boxes: [P, 4] the boxes of these objects.
        negatives: [N, 4] the coordinates of as many random background candidates as there are positives, or of all
            where there are fewer.
    """

    positives: Tensor
    target_boxes: Tensor
    negatives: Tensor

    @classmethod
    def choose(cls, samples: PositiveSamples, num_classes: int) -> "CustomisedQueries":
        """The queries of the candidates of one image, before ``MODEL.CODETR.POSITIVE_QUERIES`` bounds their number."""
        [boxes], [labels], [target_boxes] = samples.boxes, samples.labels, samples.target_boxes
        is_positive = labels != num_classes
        # What a head leaves out of its training has a box without an area.
        background = boxes[~is_positive & (boxes[:, 2:] > boxes[:, :2]).all(dim=1)]
        chosen = torch.randperm(len(background), device=boxes.device)[: int(is_positive.sum())]
        return cls(boxes[is_positive], target_boxes[is_positive], background[chosen])


@torch.no_grad()
def customised_queries(model: nn.Module, memory: FeaturePyramid, instances: Instances) -> dict[str, CustomisedQueries]:
    """The customised queries of every auxiliary head of a model, by its name.

    The heads choose them as in training, and are in eval mode again after that; the rest of the model stays in eval
    mode: neither dropout nor statistics of batches take part. What is random is the same at each call, and the global
    generator is left as it was.

    Args:
        model: a :class:`~codetr_d2.modeling.meta_arch.CoDETR` in eval mode.
        memory: the encoder's output for one image.
        instances: the ground truth of the image, on the device of the model.
    """
    pyramid = model.auxiliary_pyramid(memory)
    num_classes = model.query_head.criterion.num_classes
    queries = {}
    with torch.random.fork_rng(), EventStorage():  # detectron2's heads log into the latter
        torch.manual_seed(SEED)
        for name, head in model.auxiliary_heads.items():
            head.train()
            try:
                queries[name] = CustomisedQueries.choose(head.candidates(pyramid, [instances]), num_classes)
            finally:
                head.eval()
    return queries


def distance_to_nearest(boxes: Tensor, originals: Tensor, image_size: tuple[int, int]) -> Tensor:
    """How far the centre of each box is from the nearest centre of the original queries.

    Args:
        boxes: [N, 4] xyxy pixels.
        originals: [Q, 2] (x, y) pixels, the centres of the first layer's reference boxes of the matching queries.
        image_size: (height, width) in pixels.

    Returns:
        [N] as a share of the diagonal of the image.
    """
    centres = (boxes[:, :2] + boxes[:, 2:]) / 2
    height, width = image_size
    return torch.cdist(centres, originals).amin(dim=1) / (height**2 + width**2) ** 0.5


def positives_of_objects(target_boxes: Tensor, gt_boxes: Tensor) -> Tensor:
    """How many positive queries each object has.

    Args:
        target_boxes: [P, 4] for each query the box of its object.
        gt_boxes: [G, 4] the boxes of the objects, in the same coordinates.

    Returns:
        [G] int64. Objects of the same box count as the first of them.
    """
    if not len(gt_boxes):
        return torch.zeros(0, dtype=torch.int64, device=gt_boxes.device)
    # Not by equality: a head may have computed with the boxes.
    return torch.cdist(target_boxes, gt_boxes).argmin(dim=1).bincount(minlength=len(gt_boxes))


@torch.no_grad()
def measure_queries(models: Iterable[AnalysedModel], num_images: int, output: Path) -> list[dict]:
    """Count customised queries, draw them, and measure their distance from the original queries.

    Writes ``queries.png`` (where they are), ``queries_distance.png``, ``queries.json`` and ``.csv`` (what is returned),
    and ``queries_objects.json`` and ``.csv``: for each object the number of its positive queries.

    Args:
        models: what to compare.
        num_images: how many images of the test dataset.
        output: a folder that exists.

    Returns:
        A row for each model and head: ``model``, ``head``, ``positives per object``, ``objects without``
        (share of objects without a positive query), ``positive distance`` and ``negative distance`` (means over all
        queries of all images of :func:`distance_to_nearest`; None without any), ``objects``, ``images``.

    Raises:
        InputError: a model has no auxiliary head, the images have no objects, or the dataset is at fault.
    """
    rows, objects, pictures = [], [], {}
    for analysed in models:
        model = analysed.model
        if not model.auxiliary_heads:
            raise InputError(
                f"--model {analysed.name}: MODEL.CODETR.AUX_HEADS is empty, so that it has no customised queries; "
                "leave it out"
            )
        counts = {name: [] for name in model.auxiliary_heads}
        distances = {name: ([], []) for name in model.auxiliary_heads}
        number = 0
        for number, x in enumerate(tqdm(images(analysed, num_images), desc=analysed.name), 1):
            memory = model.encode(model.features(model.preprocess([x])))
            instances, size = x["instances"].to(model.device), tuple(x["image"].shape[-2:])
            reference = model.query_head.matching_queries_at_inference(memory).reference_boxes[0]
            originals = reference[:, :2] * memory.geometry.image_sizes_xyxy[0, :2]
            for name, queries in customised_queries(model, memory, instances).items():
                counts[name].append(positives_of_objects(queries.target_boxes, instances.gt_boxes.tensor).cpu())
                for found, boxes in zip(distances[name], (queries.positives, queries.negatives)):
                    found.append(distance_to_nearest(boxes, originals, size).cpu())
                for i, value in enumerate(counts[name][-1].tolist()):
                    place = {"file_name": x["file_name"], "object": i}
                    objects.append({"model": analysed.name, "head": name, **place, "positives": value})
                if number <= NUM_PICTURES:
                    pictures.setdefault(f"{analysed.name}: {name}", []).append(
                        plots.Scatter(
                            plots.to_rgb(x["image"], analysed.cfg.INPUT.FORMAT),
                            x["instances"].gt_boxes.tensor,
                            {
                                "positive": _centres(queries.positives),
                                "negative": _centres(queries.negatives),
                                "original": originals.cpu(),
                            },
                        )
                    )
        for name in counts:
            of_objects = torch.cat(counts[name]).double()
            if not len(of_objects):
                raise InputError(f"the {number} images of the test dataset have no objects; raise --images")
            positive, negative = (_mean(torch.cat(found)) for found in distances[name])
            rows.append(
                {
                    "model": analysed.name,
                    "head": name,
                    "positives per object": of_objects.mean().item(),
                    "objects without": (of_objects == 0).double().mean().item(),
                    "positive distance": positive,
                    "negative distance": negative,
                    "objects": len(of_objects),
                    "images": number,
                }
            )
    write_rows(output, "queries", rows)
    write_rows(output, "queries_objects", objects)
    plots.draw_scatters(
        output / "queries.png",
        pictures,
        title="Customised queries of the auxiliary heads,\nby the centres of their boxes",
    )
    distances = {
        kind: {f"{x['model']}: {x['head']}": x[f"{kind} distance"] for x in rows if x[f"{kind} distance"] is not None}
        for kind in ("positive", "negative")
    }
    plots.draw_bars(
        output / "queries_distance.png",
        {"distance of centres / diagonal of the image": distances},
        title=f"Distance of customised queries from\nthe nearest original one, mean over {number} images",
    )
    return rows


def _mean(values: Tensor) -> float | None:
    return values.double().mean().item() if len(values) else None


def _centres(boxes: Tensor) -> Tensor:
    """[N, 4] xyxy -> [N, 2] on the CPU."""
    return ((boxes[:, :2] + boxes[:, 2:]) / 2).cpu()
