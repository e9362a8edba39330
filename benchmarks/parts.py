"""``python -m benchmarks parts``: the roofline. What each part of the model takes, beside what the machine can do."""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from codetr_d2.analysis.flops import count_flops
from codetr_d2.errors import InputError
from codetr_d2.layers import BlockSelfAttention, MultiScaleDeformableAttention
from codetr_d2.modeling.transformer.encoder import FeedForward

from .machine import Stopwatch, describe_machine, finisher
from .model import WARM_UP, Case, Runner, first_case
from .report import machine_line, plot_bars, print_table, save

__all__ = ["Counter", "Scopes", "benchmark_parts"]

REST = "the rest"
OPERATOR = "ms_deform_attn"
# Parts of encoder and decoder; what is in none of them is "norms and rest".
MODULES = {
    MultiScaleDeformableAttention: "projections and locations",
    FeedForward: "feed-forward",
    BlockSelfAttention: "self-attention",
}
MATRIX_PRODUCTS = ((2048, 2048, 2048), (22223, 256, 1024), (22223, 1024, 256), (4096, 1024, 4096))
COPIED_BYTES = 2**28


class Scopes(Stopwatch):
    """Which part of the model is at work, and the seconds of each, without those of the parts inside it."""

    def __init__(self, finish: Callable[[], None]):
        super().__init__(finish)
        self.stack = [REST]

    def enter(self, name: str) -> None:
        self.lap(self.stack[-1])
        self.stack.append(name)

    def leave(self) -> None:
        self.lap(self.stack.pop())

    @contextmanager
    def inside(self, name: str) -> Iterator[None]:
        """What is done in this context is a part of this name."""
        self.enter(name)
        try:
            yield
        finally:
            self.leave()

    def add(self, name: str, module: nn.Module) -> None:
        """Make the module's forward pass a part of this name."""
        module.register_forward_pre_hook(lambda *_: self.enter(name))
        module.register_forward_hook(lambda *_: self.leave(), always_call=True)

    def divide(self, model: nn.Module) -> None:
        """Make parts of the model's modules."""
        head = model.query_head
        parts = {
            "backbone": model.backbone,
            "neck": model.neck,
            "encoder: norms and rest": head.encoder,
            "proposals": head.proposals,
            "decoder: norms and rest": head.decoder,
            "matching and losses of queries": head.criterion,
            **{f"auxiliary head {name}": module for name, module in model.auxiliary_heads.items()},
        }
        for name, module in parts.items():
            if module is not None:
                self.add(name, module)
        for owner, module in (("encoder", head.encoder), ("decoder", head.decoder)):
            for child in module.modules():
                if type(child) in MODULES:
                    self.add(f"{owner}: {MODULES[type(child)]}", child)


class OperatorScope(TorchDispatchMode):
    """Makes deformable attention a part of the encoder or decoder that calls it. In plain PyTorch it is no operator."""

    def __init__(self, scopes: Scopes):
        super().__init__()
        self.scopes = scopes

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = func.overloadpacket.__name__
        if OPERATOR not in name or name.endswith("backward"):
            return func(*args, **kwargs or {})
        owner = self.scopes.stack[-1].partition(":")[0]
        with self.scopes.inside(f"{owner}: deformable attention"):
            return func(*args, **kwargs or {})


class Counter(TorchDispatchMode):
    """Counts the floating-point operations and the bytes of everything that PyTorch computes, by part of the model.

    The bytes are those of the tensors that each operation reads and writes, as if nothing stayed in a cache and
    everything of them was needed; views cost nothing.
    """

    def __init__(self, scopes: Scopes):
        super().__init__()
        self.scopes = scopes
        self.flops: dict[str, int] = defaultdict(int)
        self.bytes: dict[str, int] = defaultdict(int)

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        kwargs = kwargs or {}
        output = func(*args, **kwargs)
        part = self.scopes.stack[-1]
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
        if flops := count_flops(func, args, kwargs, output, inputs):
            self.flops[part] += flops
        storages = {x.untyped_storage().data_ptr() for x in inputs}
        is_view = not func._schema.is_mutable and any(x.untyped_storage().data_ptr() in storages for x in outputs)
        is_empty = func.overloadpacket.__name__.startswith(("empty", "new_empty"))
        if not is_view and not is_empty:
            self.bytes[part] += sum(map(stored_bytes, inputs + outputs))
        return output


def stored_bytes(x: Tensor) -> int:
    """Bytes of a tensor; what is expanded counts once."""
    size = x.element_size()
    for length, stride in zip(x.shape, x.stride()):
        size *= length if stride or not length else 1
    return size


def best_seconds(function: Callable[[], object], finish: Callable[[], None], repeat: int = 7) -> float:
    """The fastest of some runs, after one that warms up."""
    seconds = []
    for _ in range(repeat + 1):
        finish()
        start = time.perf_counter()
        function()
        finish()
        seconds.append(time.perf_counter() - start)
    return min(seconds[1:])


def measure_peaks(device: str) -> dict[str, float]:
    """What this machine reaches: flops a second of matrix products in each dtype, bytes a second of a large copy."""
    finish, peaks = finisher(device), {}
    for dtype in (torch.float32, torch.bfloat16):
        rates = []
        for m, k, n in MATRIX_PRODUCTS:
            a, b = torch.randn(m, k, device=device).to(dtype), torch.randn(n, k, device=device).to(dtype)
            seconds = best_seconds(lambda a=a, b=b: nn.functional.linear(a, b), finish)
            rates.append(2 * m * k * n / seconds)
        peaks[str(dtype).removeprefix("torch.")] = max(rates)
    source = torch.ones(COPIED_BYTES // 4, device=device)
    target = torch.zeros_like(source)
    peaks["copy"] = 2 * COPIED_BYTES / best_seconds(lambda: target.copy_(source), finish)
    return peaks


class DividedRunner(Runner):
    """Runs our model, divided into parts."""

    def __init__(self, case: Case):
        super().__init__(case, [])
        self.scopes = Scopes(self.finish)
        self.scopes.divide(self.model)
        if case.training:
            self.optimizer.register_step_pre_hook(lambda *_: self.scopes.enter("the optimizer's step"))
            self.optimizer.register_step_post_hook(lambda *_: self.scopes.leave())

    def backward(self, loss: Tensor) -> None:
        with self.scopes.inside("backward"):
            super().backward(loss)


def benchmark_parts(args: argparse.Namespace) -> None:
    """The command ``parts``."""
    if len(args.sizes) > 1:
        raise InputError("--sizes: parts are measured at one size")
    case = first_case(args, args.train)
    machine = describe_machine(args.device, args.threads)
    torch.set_num_threads(args.threads)
    peaks = measure_peaks(args.device)
    runner = DividedRunner(case)
    scopes, runs = runner.scopes, []
    with OperatorScope(scopes):
        for turn in range(WARM_UP[args.device] + args.repeat):
            scopes.restart()
            runner.run(turn)
            scopes.lap(REST)
            runs.append(scopes.seconds)
    with Counter(scopes) as counter, OperatorScope(scopes):
        runner.run(turn)
    runs = runs[WARM_UP[args.device] :]
    parts = {}
    for name in dict.fromkeys(name for run in runs for name in run):
        seconds = statistics.median(run.get(name, 0.0) for run in runs)
        flops, moved = counter.flops[name], counter.bytes[name]
        parts[name] = {
            "seconds": seconds,
            "flops": flops,
            "bytes": moved,
            "share_of_peak_flops": flops / seconds / peaks[args.dtype],
            "share_of_peak_bandwidth": moved / seconds / peaks["copy"],
        }
    parts = dict(sorted(parts.items(), key=lambda item: -item[1]["seconds"]))
    total = sum(part["seconds"] for part in parts.values())
    height, width = case.size
    command = "training step" if case.training else "inference"
    title = f"{Path(args.config_file).stem}, {command}, {height}x{width}, batch {args.batch}, {args.dtype}"
    report = {
        "command": "parts",
        "config": Path(args.config_file).stem,
        "options": args.opts,
        "training": case.training,
        "size": list(case.size),
        "batch": args.batch,
        "objects": case.objects,
        "dtype": args.dtype,
        "backend": runner.backend,
        "machine": machine,
        "peaks": peaks,
        "seconds": total,
        "parts": parts,
    }
    print(f"{title}; {machine_line(machine)}")
    print(
        f"peaks: {peaks['float32'] / 1e9:.0f} GFLOP/s float32, {peaks['bfloat16'] / 1e9:.0f} GFLOP/s bfloat16, "
        f"{peaks['copy'] / 1e9:.1f} GB/s\n"
    )
    print_table(
        [
            {
                "part": name,
                "ms": f"{1000 * part['seconds']:.1f}",
                "share of time": f"{part['seconds'] / total:.0%}",
                "GFLOP": f"{part['flops'] / 1e9:.2f}",
                "GB": f"{part['bytes'] / 1e9:.2f}",
                "of peak flops": f"{part['share_of_peak_flops']:.0%}",
                "of peak bandwidth": f"{part['share_of_peak_bandwidth']:.0%}",
            }
            for name, part in parts.items()
        ]
    )
    if args.output:
        shares = {
            "flops": {name: 100 * part["share_of_peak_flops"] for name, part in parts.items()},
            "bandwidth": {name: 100 * part["share_of_peak_bandwidth"] for name, part in parts.items()},
        }
        seconds = {"seconds": {name: part["seconds"] for name, part in parts.items()}}
        save(report, plot_bars(title, {"seconds": seconds, "% of this machine's peak": shares}), args.output)
