"""metrics.json -> charts of a training: which curves belong together, and what they are called."""

import math
import re
from collections import defaultdict
from collections.abc import Sequence

__all__ = ["training_charts"]

AP_NAMES = ("AP", "AP50", "AP75")
TASKS = {"bbox": "boxes", "segm": "masks"}


def training_charts(metrics: Sequence[dict], head_names: Sequence[str]) -> list[dict]:
    """The charts of a training, in the order in which they are shown; what was not logged is left out.

    Args:
        metrics: what metrics.json says of each iteration.
        head_names: of the auxiliary heads, as losses end in them.

    Returns:
        For each chart ``title``, ``log`` (whether its axis is best logarithmic) and ``series``: ``name``, ``layer``
        (of the decoder, None for the last one and for what has no layers), ``x`` (iterations), ``y``.
    """
    names = list(dict.fromkeys(name for values in metrics for name in values))
    charts: dict[str, dict] = {}

    def add(title: str, name: str, label: str, layer: int | None = None, log: bool = False) -> None:
        points = [(x["iteration"], x[name]) for x in metrics if name in x and math.isfinite(x[name])]
        if points:
            x, y = zip(*points)
            chart = charts.setdefault(title, {"title": title, "log": log, "series": []})
            chart["series"].append({"name": label, "layer": layer, "x": list(x), "y": list(y)})

    for task, what in TASKS.items():
        for name in AP_NAMES:
            add("Average precision (%)", f"{task}/{name}", f"{name} of {what}" if "segm/AP" in names else name)
    add("Total loss", "total_loss", "total", log=True)
    for title, losses in _loss_groups(names, head_names).items():
        for name, label, layer in losses:
            add(title, name, label, layer, log=True)
    add("Learning rate", "lr", "learning rate")
    add("Gradient norm", "grad_norm", "norm", log=True)
    add("Seconds per iteration", "time", "iteration")
    add("Seconds per iteration", "data_time", "waiting for data")
    add("GPU memory (MB)", "max_mem", "peak")
    for name in names:
        prefix, _, rest = name.partition("/")
        if rest and prefix not in TASKS:
            add(f"Logged by {prefix}", name, rest)
    return list(charts.values())


def _loss_groups(names: Sequence[str], heads: Sequence[str]) -> dict[str, list[tuple[str, str, int | None]]]:
    """By title (name of the loss in metrics.json, what it is, layer of the decoder)."""
    origins = {"": "Losses of the detector", "_enc": "Losses of the encoder's proposals"}
    origins["_dn"] = "Losses of denoising queries"
    origins |= {f"_{head}": f"Losses of auxiliary head {head}" for head in heads}
    origins |= {f"_aux_{head}": f"Losses of positive queries of {head}" for head in heads}
    pattern = re.compile(rf"loss_(\w+?)({'|'.join(sorted(origins, key=len, reverse=True))})(?:_(\d+))?")
    groups = defaultdict(list)
    for name in names:
        if match := pattern.fullmatch(name):
            what, origin, layer = match.groups()
            groups[origin].append((name, what, None if layer is None else int(layer)))
    return {title: sorted(groups[origin], key=lambda x: x[1]) for origin, title in origins.items() if groups[origin]}
