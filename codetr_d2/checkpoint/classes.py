"""Classifiers of other classes: rows start anew, or are taken over by the name of their class."""

import itertools
import json
import os
import re
from collections.abc import Sequence

from detectron2.data import MetadataCatalog
from torch import Tensor

from ..errors import InputError
from ..modeling.facts import ClassRows

__all__ = ["adapt_classifiers", "dataset_classes", "match_classes", "number_of_classes", "rows_of"]


def rows_of(name: str, class_rows: dict[str, ClassRows]) -> ClassRows | None:
    """How the rows of a parameter belong to classes, None where they do not."""
    return class_rows.get(name) or class_rows.get(name.rpartition(".")[0])


def number_of_classes(state_dict: dict[str, Tensor], class_rows: dict[str, ClassRows]) -> int | None:
    """The number of classes, by the first classifier of a state dict; None where there is none.

    Args:
        state_dict: of the model, or of a file for it by our names.
        class_rows: what the model says of its classifiers (:func:`codetr_d2.modeling.facts.class_rows`).
    """
    for place, rows in class_rows.items():
        for name in (place, f"{place}.weight", f"{place}.bias"):
            if rows.are_classes and name in state_dict:
                return (len(state_dict[name]) - rows.extra) // (rows.per_class * rows.repeats)
    return None


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
    weights: dict[str, Tensor],
    own: dict[str, Tensor],
    class_rows: dict[str, ClassRows],
    matches: dict[int, int] | None,
) -> tuple[dict[str, Tensor], set[str]]:
    """Fit the classifiers of a file to the classes of a model.

    Args:
        weights: of the file, by our names.
        own: the model's state dict; its values are what starts anew.
        class_rows: what the model says of its classifiers (:func:`codetr_d2.modeling.facts.class_rows`).
        matches: {the model's class: the file's} to take over; None: none.

    Returns:
        The weights without the classifiers that start anew, and the names of those.
    """
    in_file, in_model = (number_of_classes(x, class_rows) for x in (weights, own))
    result, anew = {}, set()
    for name, value in weights.items():
        rows, target = rows_of(name, class_rows), own.get(name)
        if rows is None or target is None or value.shape[1:] != target.shape[1:]:
            result[name] = value
            continue
        per_class, extra, repeats = rows.per_class, rows.extra, rows.repeats
        if any(len(x) != repeats * per_class * n + extra for x, n in ((value, in_file), (target, in_model))):
            result[name] = value  # the same for all classes; where the model's is not, the shapes will tell
            continue
        if not rows.are_classes:
            pairs = {i: i for i in range(min(in_file, in_model))}
        elif matches is None:
            anew.add(name)
            continue
        else:
            pairs = matches
        adapted = target.detach().clone()
        for repeat, (to, source) in itertools.product(range(repeats), pairs.items()):
            to, source = (repeat * in_model + to) * per_class, (repeat * in_file + source) * per_class
            adapted[to : to + per_class] = value[source : source + per_class]
        if extra:
            adapted[-extra:] = value[-extra:]
        result[name] = adapted
    return result, anew
