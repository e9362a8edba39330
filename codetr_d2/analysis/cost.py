"""What a model costs: parameters, FLOPs and activations of each module at inference, and the time that it takes.

Also what training costs in parameters, for each auxiliary head (paper, section 3: inference pays nothing for them).
"""

import statistics
import time
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import torch
from detectron2.config import CfgNode
from detectron2.modeling import build_model
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.module_tracker import ModuleTracker

from ..config.config_file import load_config, resolve_device
from . import plots
from .flops import count_flops
from .models import ModelSpec, check_names
from .results import write_rows

__all__ = ["PARTS", "Cost", "ModuleCost", "build_with_random_weights", "compare_costs", "measure_cost", "parts_of"]

PARTS = {
    "backbone": "backbone",
    "neck": "neck",
    "encoder": "query_head.encoder",
    "proposals": "query_head.proposals",
    "decoder": "query_head.decoder",
    "mask head": "mask_head",
    "auxiliary heads": "auxiliary_heads",
    "auxiliary level": "auxiliary_level",
    "positive queries": "query_head.positive_queries",
}
REST = "rest"
WARM_UP = {"cpu": 1, "cuda": 5}  # runs that are not timed


@dataclass
class ModuleCost:
    """What one module costs, those inside it included.

    Attributes:
        parameters: all that it has.
        parameters_at_inference: those that inference reads.
        flops: at inference, for one image; a multiplication with its addition counts once, as in the papers on DETRs
            and in fvcore. Convolutions, matrix products, attention, and the samples of deformable attention and
            ROIAlign; normalisation and what works element by element count nothing.
        activations: numbers that these operators give, for one image.
    """

    parameters: int = 0
    parameters_at_inference: int = 0
    flops: int = 0
    activations: int = 0


@dataclass
class Cost:
    """What a model costs.

    Attributes:
        modules: by its name in the model, ``""`` for the model; only modules with parameters or FLOPs.
        auxiliary_parameters: by the name of each auxiliary head the parameters that training adds for it, those of its
            positive queries included.
        seconds: of each timed run, from an image in memory to its detections.
        size: (height, width) of the image in pixels, before padding.
    """

    modules: dict[str, ModuleCost]
    auxiliary_parameters: dict[str, int]
    seconds: list[float]
    size: tuple[int, int]

    @property
    def total(self) -> ModuleCost:
        return self.modules[""]

    @property
    def median_seconds(self) -> float:
        return statistics.median(self.seconds)

    def down_to(self, depth: int) -> dict[str, ModuleCost]:
        """The modules whose names have at most ``depth`` parts, the model first."""
        return {name: cost for name, cost in self.modules.items() if not name or name.count(".") < depth}


def build_with_random_weights(cfg: CfgNode) -> nn.Module:
    """The model of a config for inference on its device: with random weights, and in need of neither file nor data."""
    cfg = cfg.clone()
    cfg.defrost()
    cfg.MODEL.WEIGHTS, cfg.MODEL.TIMM.PRETRAINED = "", False
    return build_model(cfg).eval()


class _Counter(TorchDispatchMode):
    """Counts FLOPs and activations by module, and remembers the parameters that are read.

    It sees the operators themselves, as they run: tracing by ``torch.jit``, on which fvcore's counters rest, takes
    neither this project's operators nor sizes that are numbers.
    """

    def __init__(self, modules: ModuleTracker):
        super().__init__()
        self.modules = modules
        self.flops: dict[str, int] = defaultdict(int)
        self.activations: dict[str, int] = defaultdict(int)
        self.read: set[int] = set()  # where the storages of tensors begin that an operator took

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        tensors = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        self.read.update(x.untyped_storage().data_ptr() for x in tensors)
        if flops := count_flops(func, args, kwargs, output, tensors):
            first = next(x for x in tree_leaves(output) if isinstance(x, Tensor))
            activations = first.numel()
            if "feed_forward" in func.overloadpacket.__name__:
                activations += len(first) * len(tensors[1])  # the hidden ones, as two linear layers would give them
            for name in {ancestor for module in self.modules.parents for ancestor in _ancestors(module)}:
                self.flops[name] += flops // 2
                self.activations[name] += activations
        return output


def _ancestors(name: str) -> list[str]:
    """``Model.a.b``, as a :class:`ModuleTracker` calls a module, -> the modules around it and itself: "", a, a.b."""
    parts = name.split(".")[1:]
    return [".".join(parts[:i]) for i in range(len(parts) + 1)]


@torch.no_grad()
def measure_cost(model: nn.Module, size: tuple[int, int], repeat: int = 5) -> Cost:
    """Run a model on a random picture: once to count, some times more to time it.

    Args:
        model: in eval mode, on the device that is to be timed.
        size: (height, width) of the picture in pixels. The model pads it as usual.
        repeat: timed runs, at least one, after some that are not timed.
    """
    height, width = size
    image = torch.randint(256, (3, height, width), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)
    inputs = [{"image": image, "height": height, "width": width}]
    with ModuleTracker() as modules, _Counter(modules) as counter:
        model(inputs)
    read = {name for name, x in model.named_parameters() if x.untyped_storage().data_ptr() in counter.read}
    costs = defaultdict(ModuleCost)
    for name, parameter in model.named_parameters():
        for module in _ancestors(f"model.{name}")[:-1]:
            costs[module].parameters += parameter.numel()
            costs[module].parameters_at_inference += parameter.numel() * (name in read)
    for name, flops in counter.flops.items():
        costs[name].flops, costs[name].activations = flops, counter.activations[name]
    order = {name: i for i, (name, _) in enumerate(model.named_modules())}
    positive_queries = model.query_head.positive_queries
    auxiliary = {
        name: sum(x.numel() for x in head.parameters())
        + (sum(x.numel() for x in positive_queries[name].parameters()) if name in positive_queries else 0)
        for name, head in model.auxiliary_heads.items()
    }
    return Cost(
        modules={name: costs[name] for name in sorted(costs, key=order.__getitem__)},
        auxiliary_parameters=auxiliary,
        seconds=_time(model, inputs, repeat),
        size=size,
    )


def _time(model: nn.Module, inputs: list[dict], repeat: int) -> list[float]:
    """Seconds of each run, the device's work included."""
    device, seconds = model.device, []
    for i in range(repeat + WARM_UP[device.type]):
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        start = time.perf_counter()
        model(inputs)
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        if i >= WARM_UP[device.type]:
            seconds.append(time.perf_counter() - start)
    return seconds


def parts_of(cost: Cost) -> dict[str, ModuleCost]:
    """The costs of :data:`PARTS` by name, and of what lies in none of them; parts that cost nothing are left out."""
    parts = {name: cost.modules.get(module, ModuleCost()) for name, module in PARTS.items()}
    fields = ModuleCost.__dataclass_fields__
    rest = ModuleCost(*(getattr(cost.total, x) - sum(getattr(part, x) for part in parts.values()) for x in fields))
    return {name: part for name, part in {**parts, REST: rest}.items() if part.parameters or part.flops}


def compare_costs(
    specs: Sequence[ModelSpec], opts: Sequence[str], size: tuple[int, int], repeat: int, depth: int, output: Path
) -> list[dict]:
    """Measure the costs of the models of some configs. Neither weights nor datasets are read.

    Writes ``cost.png``, ``cost.json`` and ``cost.csv`` (every module), ``cost_models`` (whole models, their times,
    the device) and ``cost_auxiliary_heads`` (parameters that training adds for each) as JSON and CSV too.

    Args:
        specs: what to compare; their weights do not matter.
        opts: key, value, key, value, ... of every config.
        size: (height, width) of the picture in pixels.
        repeat: timed runs.
        depth: down to which modules are returned: 1 is backbone, neck, query_head, ...
        output: a folder that exists.

    Returns:
        A row for each model and module, the model itself first, with numbers in the units of its keys.
    """
    check_names(specs)
    costs, modules, models, heads = {}, [], [], []
    for spec in specs:
        cfg = load_config(spec.config_file, opts)
        cfg.MODEL.DEVICE = resolve_device(cfg)
        cfg.MODEL.CODETR.COMPILE = False  # inside compiled modules nothing can be counted
        cost = costs[spec.name] = measure_cost(build_with_random_weights(cfg), size, repeat)
        modules += [{"model": spec.name, "module": x, **vars(module)} for x, module in cost.modules.items()]
        models.append(
            {
                "model": spec.name,
                "height": size[0],
                "width": size[1],
                "device": cfg.MODEL.DEVICE,
                **vars(cost.total),
                "median_seconds": cost.median_seconds,
                "fastest_seconds": min(cost.seconds),
                "slowest_seconds": max(cost.seconds),
            }
        )
        heads += [{"model": spec.name, "head": x, "parameters": n} for x, n in cost.auxiliary_parameters.items()]
    write_rows(output, "cost", modules)
    write_rows(output, "cost_models", models)
    write_rows(output, "cost_auxiliary_heads", heads)
    _draw(costs, output / "cost.png")
    return [row for name, cost in costs.items() for row in _table(name, cost, depth)]


def _table(name: str, cost: Cost, depth: int) -> list[dict]:
    rows = []
    for module, x in cost.down_to(depth).items():
        rows.append(
            {
                "model": name,
                "module": module or "all",
                "parameters (M)": x.parameters / 1e6,
                "at inference (M)": x.parameters_at_inference / 1e6,
                "GFLOPs": x.flops / 1e9,
                "activations (M)": x.activations / 1e6,
                "ms": None if module else 1000 * cost.median_seconds,
            }
        )
    for head, parameters in cost.auxiliary_parameters.items():
        what = f"training adds for {head}, its queries included"
        rows.append({"model": name, "module": what, "parameters (M)": parameters / 1e6})
    return rows


def _draw(costs: dict[str, Cost], path: Path) -> None:
    parts = {name: parts_of(cost) for name, cost in costs.items()}
    quantities = {
        "parameters in training (millions)": lambda x: x.parameters / 1e6,
        "parameters at inference (millions)": lambda x: x.parameters_at_inference / 1e6,
        "GFLOPs at inference": lambda x: x.flops / 1e9,
        "activations at inference (millions)": lambda x: x.activations / 1e6,
    }
    panels = {
        label: {name: {part: of(x) for part, x in own.items()} for name, own in parts.items()}
        for label, of in quantities.items()
    }
    legend = {
        name: f"{name}: {cost.total.parameters_at_inference / 1e6:.1f} M parameters at inference, "
        f"{cost.total.flops / 1e9:.1f} GFLOPs, {1000 * cost.median_seconds:.1f} ms"
        for name, cost in costs.items()
    }
    (height, width), *_ = (cost.size for cost in costs.values())
    title = f"Cost by part of the model, one image of {height} x {width} pixels"
    plots.draw_bars(path, panels, title=title, legend=legend, order=[*PARTS, REST])
