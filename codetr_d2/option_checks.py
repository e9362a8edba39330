"""Small checks of options, which components and the config's own checks are written with.

Each raises :class:`InputError` naming the option and what it may be. ``key`` is the full name of an option.
"""

import math
from collections.abc import Sequence

from detectron2.config import CfgNode

from .errors import InputError

__all__ = ["divisible", "one_of", "option", "positive", "share", "within"]


def option(cfg: CfgNode, key: str):
    """The value of an option."""
    for part in key.split("."):
        cfg = cfg[part]
    return cfg


def one_of(cfg: CfgNode, key: str, allowed: Sequence[str]) -> None:
    """The option, or each of its entries, is one of ``allowed``."""
    value = option(cfg, key)
    for item in value if isinstance(value, (list, tuple)) else [value]:
        if item not in allowed:
            raise InputError(f"{key} is {item!r}; it may be: {', '.join(map(str, allowed))}")


def positive(cfg: CfgNode, *keys: str) -> None:
    """The options are greater than 0."""
    for key in keys:
        if option(cfg, key) <= 0:
            raise InputError(f"{key} is {option(cfg, key)}; it must be greater than 0")


def within(cfg: CfgNode, low: float, high: float, *keys: str) -> None:
    """The options lie between two limits, which they may reach."""
    for key in keys:
        if not low <= option(cfg, key) <= high:
            limits = f"at least {low}" if high == math.inf else f"from {low} to {high}"
            raise InputError(f"{key} is {option(cfg, key)}; it must be {limits}")


def share(cfg: CfgNode, key: str) -> None:
    """The option is at least 0 and less than 1."""
    if not 0 <= option(cfg, key) < 1:
        raise InputError(f"{key} is {option(cfg, key)}; it must be at least 0 and less than 1")


def divisible(key: str, value: int, by: int, what: str) -> None:
    """``value``, which the message calls ``key``, is a multiple of ``by``, which it calls ``what``."""
    if value % by:
        raise InputError(f"{key} is {value}, which {what} ({by}) does not divide")
