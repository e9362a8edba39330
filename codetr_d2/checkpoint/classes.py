"""Classifiers of other classes: rows start anew, or are taken over by the name of their class."""

import json
import os
import re
from collections.abc import Sequence

from detectron2.data import MetadataCatalog
from torch import Tensor

from ..errors import InputError

__all__ = ["adapt_classifiers", "dataset_classes", "match_classes", "number_of_classes"]

_DETECTOR = r"query_head\.(decoder\.class_embed\.\d+|proposals\.class_embed|denoising\.label_embed)"
_ATSS = r"auxiliary_heads\.atss\d*\.cls_score"
_ROI = r"auxiliary_heads\.roi\d*\.roi_heads"
_MASKS = r"mask_head\.(stage_instance_logits\.[012]|iou_head\.fc_mask_iou)"
# (names, rows of each class, rows after those of the classes)
_CLASSIFIERS = [
    (re.compile(rf"({_DETECTOR}|{_ATSS}|{_ROI}\.mask_head\.predictor|{_MASKS})\.(weight|bias)"), 1, 0),
    (re.compile(rf"{_ROI}\.box_predictor\.cls_score\.(weight|bias)"), 1, 1),  # the last row is background
    (re.compile(rf"{_ROI}\.box_predictor\.bbox_pred\.(weight|bias)"), 4, 0),
]


def number_of_classes(state_dict: dict[str, Tensor]) -> int | None:
    """Of a model of ours by its parameters, None where it has no classifier."""
    bias = state_dict.get("query_head.decoder.class_embed.0.bias")
    return None if bias is None else len(bias)


def dataset_classes(name: str) -> list[str]:
    """The names of the classes of a registered dataset; those of its annotation file where it is not loaded yet.

    Raises:
        InputError: it is not registered, or has no names.
    """
    metadata = MetadataCatalog.get(name) if name in MetadataCatalog else None
    names = metadata and metadata.get("thing_classes")
    if metadata and not names and os.path.isfile(path := metadata.get("json_file") or ""):
        try:
            with open(path) as file:
                categories = json.load(file)["categories"]
            names = [x["name"] for x in sorted(categories, key=lambda x: x["id"])]
        except (ValueError, KeyError, TypeError) as error:
            raise InputError(
                f"{path}: has no list of categories with id and name ({error}), which MODEL.CODETR.REUSE_CLASSES "
                f"{name} asks for; mend the file, or set the option to ''"
            ) from None
    if not names:
        raise InputError(
            f"MODEL.CODETR.REUSE_CLASSES: no dataset {name!r} with names of classes is known; name the one that the "
            "weights were trained on, for instance coco_2017_train or lvis_v1_train"
        )
    return list(names)


def match_classes(wanted: Sequence[str], given: Sequence[str]) -> dict[int, int]:
    """{index in ``wanted``: index in ``given``} of the classes that both name.

    Case, underscores and an explanation in parentheses ("bow_(weapon)") don't count, where the full name is not found.
    """
    full, short = {}, {}
    for i, name in enumerate(given):
        full.setdefault(_normalise(name), i)
        short.setdefault(_without_explanation(name), i)
    matches = {}
    for i, name in enumerate(wanted):
        index = full.get(_normalise(name), short.get(_without_explanation(name)))
        if index is not None:
            matches[i] = index
    return matches


def _normalise(name: str) -> str:
    return " ".join(name.lower().replace("_", " ").split())


def _without_explanation(name: str) -> str:
    return re.sub(r"\s*\([^()]*\)$", "", _normalise(name))


def adapt_classifiers(
    weights: dict[str, Tensor], own: dict[str, Tensor], matches: dict[int, int] | None
) -> tuple[dict[str, Tensor], set[str]]:
    """Fit the classifiers of a file to the classes of a model.

    The encoder's classifier of Co-Deformable-DETR learns in its first row whether there is any object, which no choice
    of classes changes: its rows are taken over as they stand.

    Args:
        weights: of the file, by our names.
        own: the model's state dict; its values are what starts anew.
        matches: {the model's class: the file's} to take over; None: none.

    Returns:
        The weights without the classifiers that start anew, and the names of those.
    """
    in_file, in_model = number_of_classes(weights), number_of_classes(own)
    rows_are_objectness = any(name.startswith("query_head.box_proj.") for name in own)
    result, anew = {}, set()
    for name, value in weights.items():
        layout = next(((per, extra) for names, per, extra in _CLASSIFIERS if names.fullmatch(name)), None)
        target = own.get(name)
        if layout is None or target is None or value.shape[1:] != target.shape[1:]:
            result[name] = value
            continue
        per_class, extra = layout
        if (len(value), len(target)) != (per_class * in_file + extra, per_class * in_model + extra):
            result[name] = value  # the same for all classes; where the model's is not, the shapes will tell
            continue
        if rows_are_objectness and name.startswith("query_head.proposals."):
            pairs = {i: i for i in range(min(in_file, in_model))}
        elif matches is None:
            anew.add(name)
            continue
        else:
            pairs = matches
        adapted = target.detach().clone()
        for to, source in pairs.items():
            adapted[to * per_class : (to + 1) * per_class] = value[source * per_class : (source + 1) * per_class]
        if extra:
            adapted[-extra:] = value[-extra:]
        result[name] = adapted
    return result, anew
