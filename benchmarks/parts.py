"""``python -m benchmarks parts``: the roofline. What each part of the model takes, beside what the machine can do."""

import argparse
import statistics
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from unittest import mock

import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from torch.utils.flop_counter import flop_registry

from codetr_d2.errors import InputError
from codetr_d2.layers import BlockSelfAttention, MultiScaleDeformableAttention, deformable_attention
from codetr_d2.modeling.transformer.encoder import FeedForward
from codetr_d2.ops.ms_deform_attn import library_is_loaded

from .machine import describe_machine, finisher
from .model import WARM_UP, Runner, first_case
from .report import machine_line, plot_bars, print_table, save

__all__ = ["Counter", "Scopes", "benchmark_parts"]

REST = "the rest"
OPERATOR = "deformable attention"
# Parts of encoder and decoder; what is in none of them is "norms and rest".
MODULES = {
    MultiScaleDeformableAttention: "projections and locations",
    FeedForward: "feed-forward",
    BlockSelfAttention: "self-attention",
}
MATRIX_PRODUCTS = ((2048, 2048, 2048), (22223, 256, 1024), (22223, 1024, 256), (4096, 1024, 4096))
COPIED_BYTES = 2**28


def operator_flops(value: Tensor, shapes, starts, locations: Tensor, *_, out_val=None) -> int:
    """A multiplication and an addition for each channel of each of the four taps of a point."""
    return 2 * 4 * locations[..., 0].numel() * value.shape[-1]


def operator_backward_flops(grad_output: Tensor, value: Tensor, shapes, starts, locations: Tensor, *_, out_val=None):
    """The gradient of the values as many as forward; the products of gradient and taps as many again."""
    return 2 * operator_flops(value, shapes, starts, locations)


def attention_flops(query: Tensor, key: Tensor, value: Tensor, *_, out_val=None, **__) -> int:
    """Two matrix products of [B, heads, queries, keys]."""
    return 2 * query[..., 0].numel() * key.shape[-2] * (query.shape[-1] + value.shape[-1])


def attention_backward_flops(grad_output: Tensor, query: Tensor, key: Tensor, value: Tensor, *_, out_val=None, **__):
    """Five matrix products, of which one is made again."""
    return 2 * query[..., 0].numel() * key.shape[-2] * (3 * query.shape[-1] + 2 * value.shape[-1])


def feed_forward_flops(x: Tensor, weight1: Tensor, bias1: Tensor, weight2: Tensor, *_, out_val=None) -> int:
    """Two matrix products."""
    return 2 * len(x) * (weight1.numel() + weight2.numel())


def feed_forward_backward_flops(grad: Tensor, x: Tensor, hidden: Tensor, *weights_and_needs, out_val=None) -> int:
    """Four matrix products, where all gradients are needed."""
    return 4 * len(x) * sum(weight.numel() for weight in weights_and_needs[:2])


FLOPS = {
    **flop_registry,
    torch.ops.codetr_d2.ms_deform_attn: operator_flops,
    torch.ops.codetr_d2.ms_deform_attn_backward: operator_backward_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu: attention_flops,
    torch.ops.aten._scaled_dot_product_flash_attention_for_cpu_backward: attention_backward_flops,
}
if library_is_loaded():
    FLOPS[torch.ops.codetr_d2._feed_forward_cpp] = feed_forward_flops
    FLOPS[torch.ops.codetr_d2._feed_forward_cpp_backward] = feed_forward_backward_flops


class Scopes:
    """Which part of the model is at work, and the seconds of each, without those of the parts inside it.

    Args:
        finish: waits for the device.
    """

    def __init__(self, finish: Callable[[], None]):
        self.finish = finish
        self.stack = [REST]
        self.restart()

    def restart(self) -> None:
        """Forget the seconds so far."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.finish()
        self.since = time.perf_counter()

    def charge(self) -> None:
        """What has passed since the last call belongs to the part at work."""
        self.finish()
        now = time.perf_counter()
        self.seconds[self.stack[-1]] += now - self.since
        self.since = now

    def inside(self, name: str | Callable[[], str], function: Callable) -> Callable:
        """The function as a part of this name, or of the name that a function gives when it is called."""

        def wrapper(*args, **kwargs):
            self.charge()
            self.stack.append(name if isinstance(name, str) else name())
            try:
                return function(*args, **kwargs)
            finally:
                self.charge()
                self.stack.pop()

        return wrapper

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
        for owner, module in (("encoder", head.encoder), ("decoder", head.decoder)):
            for child in module.modules():
                for kind, part in MODULES.items():
                    if isinstance(child, kind):
                        child.forward = self.inside(f"{owner}: {part}", child.forward)
        for name, module in parts.items():
            if module is not None:
                module.forward = self.inside(name, module.forward)
        if model.mask_head is not None:
            for method in ("losses", "inference"):
                setattr(model.mask_head, method, self.inside("mask head", getattr(model.mask_head, method)))

    def operator_name(self) -> str:
        """The operator as a part of the encoder or decoder that calls it."""
        return f"{self.stack[-1].partition(':')[0]}: {OPERATOR}"


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
        if formula := FLOPS.get(func.overloadpacket):
            self.flops[part] += formula(*args, **kwargs, out_val=output)
        inputs = [x for x in tree_leaves((args, kwargs)) if isinstance(x, Tensor)]
        outputs = [x for x in tree_leaves(output) if isinstance(x, Tensor)]
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


def benchmark_parts(args: argparse.Namespace) -> None:
    """The command ``parts``."""
    if len(args.sizes) > 1:
        raise InputError("--sizes: parts are measured at one size")
    case = first_case(args, args.train)
    machine = describe_machine(args.device, args.threads)
    torch.set_num_threads(args.threads)
    peaks = measure_peaks(args.device)
    runner = Runner(case, [])
    scopes = Scopes(runner.finish)
    scopes.divide(runner.model)
    if case.training:
        runner.optimizer.step = scopes.inside("the optimizer's step", runner.optimizer.step)
    operator = scopes.inside(scopes.operator_name, deformable_attention.ms_deform_attn)
    with (
        mock.patch.object(deformable_attention, "ms_deform_attn", operator),
        mock.patch.object(Tensor, "backward", scopes.inside("backward", Tensor.backward)),
    ):
        runs = []
        for turn in range(WARM_UP[args.device] + args.repeat):
            scopes.restart()
            runner.run(turn)
            scopes.charge()
            runs.append(scopes.seconds)
        with Counter(scopes) as counter:
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
