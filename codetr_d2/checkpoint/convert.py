"""Whole checkpoint files: the published layout <-> ours, without loss."""

from collections import OrderedDict
from typing import Any

from detectron2.config import CfgNode

from ..errors import InputError
from .published import codetr_to_published, computed_tensors, is_published, published_to_codetr
from .safe_load import weights_entry

__all__ = ["checkpoint_to_codetr", "checkpoint_to_published"]


def checkpoint_to_codetr(data: dict[str, Any]) -> tuple[dict[str, Any], dict[str, str]]:
    """Convert a published checkpoint into one of ours.

    What has no place in ours is kept in the entry ``published``, so that the way back gives the same file:
    ``entries`` and ``weights_entry`` (names of the file's entries, in order, and of that with the weights), ``names``
    (of the weights, in order), ``metadata`` (the state dict's own), ``unused`` (weights by name), ``other`` (the other
    entries).

    Args:
        data: content of the file.

    Returns:
        The content of the converted file, and the published names of the weights that our model does not have, with
        the reason why.

    Raises:
        InputError: it is no published checkpoint.
    """
    entry = weights_entry(data)
    weights = data[entry] if entry else data
    if not is_published(weights):
        if any(name.startswith(("query_head.decoder.", "query_head.encoder.")) for name in weights):
            raise InputError("is a checkpoint of this project already; --to-published converts it back")
        raise InputError("holds no published Co-DETR weights; give backbones as MODEL.WEIGHTS, without conversion")
    converted, unused = published_to_codetr(weights)
    kept = {
        "entries": list(data) if entry else [],
        "weights_entry": entry,
        "names": list(weights),
        "metadata": getattr(weights, "_metadata", None),
        "unused": {name: weights[name] for name in unused},
        "other": {key: value for key, value in data.items() if key != entry} if entry else {},
    }
    return {"model": converted, "published": kept}, unused


def checkpoint_to_published(data: dict[str, Any], cfg: CfgNode | None = None) -> dict[str, Any]:
    """Convert a checkpoint of ours into the published layout.

    One that was converted by :func:`checkpoint_to_codetr` becomes again what it was. One that was trained here gets
    the counters and tables that the published code expects, and the averaged weights where it holds any.

    Args:
        data: content of the file.
        cfg: config of the model; only a ViT that was trained here needs it, for its tables.

    Raises:
        InputError: it is no checkpoint of ours, has parameters that the published models lack, or needs ``cfg``.
    """
    weights = dict(data[weights_entry(data)] if weights_entry(data) else data)
    if is_published(weights):
        raise InputError("has the published names already; leave out --to-published to convert it into ours")
    if not any(name.startswith("query_head.decoder.") for name in weights):
        raise InputError("holds no Co-DETR model; give a checkpoint of this project")
    weights.update(data.get("ema", {}))
    try:
        published = codetr_to_published(weights)
    except KeyError as error:
        raise InputError(f"{error.args[0]}, so the published code has no such model") from None

    kept = data.get("published")
    if kept is None:
        tables = {}
        if any(name.startswith("backbone.blocks.") for name in published):
            if cfg is None:
                raise InputError("is a ViT trained here, whose tables depend on its config; name it with --config-file")
            eva = cfg.MODEL.EVA02
            tables = {
                "window_size": eva.WINDOW_SIZE,
                "global_blocks": eva.GLOBAL_BLOCKS,
                "global_size": eva.IMAGE_SIZE // eva.PATCH_SIZE,
            }
        published |= computed_tensors(published, **tables)
        return {"meta": {}, "state_dict": OrderedDict(published)}

    published |= kept["unused"]
    if published.keys() != set(kept["names"]):
        raise InputError("was changed since its conversion; remove its entry 'published' to convert it as it is now")
    state_dict = OrderedDict((name, published[name]) for name in kept["names"])
    if kept["metadata"] is not None:
        state_dict._metadata = kept["metadata"]
    if not kept["weights_entry"]:
        return state_dict
    return {key: state_dict if key == kept["weights_entry"] else kept["other"][key] for key in kept["entries"]}
