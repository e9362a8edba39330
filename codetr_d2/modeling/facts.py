"""What a component says of itself, so that no file far away has to know it by name.

Any of these may stand in a component's class (its names relative to the component), or be absent:

``check_options(cfg)``
    Class method that raises :class:`InputError` where the options are faulty that the component is built from. Whoever
    builds the component asks for it: :class:`CoDETR` its heads, and the check of a config the detector and backbone.
``class_rows()``
    Method: {name of a module or parameter: :class:`ClassRows`} of what has rows for classes. Rows of other classes
    start anew or are taken over by the name of their class; without it they have to fit.
``PUBLISHED_NAMES``
    Rows (published name, our name) of the parameters that the published code, or another, has under other names; see
    :mod:`codetr_d2.checkpoint.published` for the fields in braces. The published name is a whole one.
``OPTIONS_OF_SHAPES``, ``OPTIONS_OF_NAMES``
    {first parts of a parameter's name: the options that decide about its shape, or whether the model has it}; the
    first that fits counts, and an inner component's before an outer one's. A part may have ``*``; "" fits all.
``OPTIONAL_PARTS``
    {first parts of parameters' names: what these are for and why a model may lack them} of what weights may have more
    than their model, or the other way round, as a whole.
``DEPTH_OPTION``
    Of a backbone whose layers are ViT blocks, under detectron2's names for these: the option that says how many there
    are, for ``SOLVER.LAYER_DECAY``.
``TELLING_PARAMETER``
    Of a query head: name of a parameter that no other query head has, by which weights of another one are told.

Functions that are registered to build a component take these from its class by :func:`stating`.
"""

from collections.abc import Callable, Iterable
from dataclasses import dataclass
from fnmatch import fnmatchcase
from typing import Any

from detectron2.config import CfgNode
from torch import nn

__all__ = ["ClassRows", "PublishedNames", "check_options", "class_rows", "stated", "stating", "under"]

PublishedNames = list[tuple[str, str]]


@dataclass(frozen=True)
class ClassRows:
    """How the rows (first axis) of a parameter belong to classes.

    Attributes:
        per_class: rows of each class, which follow each other.
        extra: rows behind those of the classes, for background.
        repeats: how many times the rows of all classes come, once for each anchor of a cell.
        are_classes: False where there are as many rows as classes, but they stand for something else: they are taken
            over as they stand, whatever the classes are.
    """

    per_class: int = 1
    extra: int = 0
    repeats: int = 1
    are_classes: bool = True


def stating(**facts: Any) -> Callable[[Callable], Callable]:
    """A decorator that lets a function state facts, by name, of the component that it builds."""

    def decorate(function: Callable) -> Callable:
        vars(function).update(facts)
        return function

    return decorate


def under(prefix: str, names: Iterable[tuple[str, str]]) -> PublishedNames:
    """The published names of a part that a component has as ``prefix``."""
    return [(published, f"{prefix}.{ours}") for published, ours in names]


def check_options(component: Any, cfg: CfgNode) -> None:
    """Let a registered component check the options that it is built from, if it does so.

    Raises:
        InputError: it finds one faulty.
    """
    if hasattr(component, "check_options"):
        component.check_options(cfg)


def class_rows(model: nn.Module) -> dict[str, ClassRows]:
    """What the modules of a model say of their rows for classes, by the full names of modules or parameters."""
    return {
        f"{path}.{name}" if path else name: rows
        for path, module in model.named_modules()
        if hasattr(module, "class_rows")
        for name, rows in module.class_rows().items()
    }


def stated(model: nn.Module, table: str, name: str) -> tuple[str, str] | None:
    """What the modules of a model say about a parameter that it has or that it might have.

    Args:
        model: the model.
        table: name of one of the dicts above, like ``OPTIONS_OF_SHAPES``.
        name: of the parameter.

    Returns:
        The first parts of the name that an entry is about, and what it says; None where no entry fits.
    """
    modules = dict(model.named_modules())
    parts = name.split(".")
    for depth in reversed(range(len(parts))):
        for pattern, value in getattr(modules.get(".".join(parts[:depth])), table, {}).items():
            patterns = pattern.split(".") if pattern else []
            stop = depth + len(patterns)
            if stop <= len(parts) and all(map(fnmatchcase, parts[depth:stop], patterns)):
                return ".".join(parts[:stop]), value
    return None
