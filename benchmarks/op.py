"""``python -m benchmarks op``: the deformable attention operator alone."""

import argparse
import ctypes
import statistics
import time
from collections.abc import Callable
from concurrent.futures import ProcessPoolExecutor
from functools import partial
from multiprocessing import get_context

import torch
from torch import Tensor

from codetr_d2.errors import InputError
from codetr_d2.ops import active_backend, ms_deform_attn

from .against import EAGER, PACKAGE, package_operator
from .machine import MemoryProbe, describe_machine, finisher
from .report import machine_line, plot_bars, print_table, save, spread

__all__ = ["AGAINST", "SIZES", "benchmark_op", "make_inputs"]

# The encoder of a model with 256 channels in 8 heads, 4 points and levels of these strides, on one image of 800 x 1333.
SIZES = {"encoder-4": (8, 16, 32, 64), "encoder-5": (4, 8, 16, 32, 64)}
IMAGE_SIZE = (800, 1333)
HEADS, HEAD_DIM, POINTS = 8, 32, 4
PASSES = ("forward", "forward + backward")
AGAINST = (EAGER, PACKAGE)


def make_inputs(strides: tuple[int, ...], dtype: torch.dtype, device: str = "cpu") -> tuple:
    """Self-attention of all tokens: each samples points about its own place, 2.5 cells of the level away on average."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(-(-IMAGE_SIZE[0] // stride), -(-IMAGE_SIZE[1] // stride)) for stride in strides]
    tokens = sum(h * w for h, w in shapes)
    # bfloat16 is what autocast makes of the values; locations and weights stay float32.
    wide = torch.promote_types(dtype, torch.float32)
    reference = [
        torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(1) for h, w in shapes
    ]
    offsets = torch.randn(1, tokens, HEADS, len(shapes), POINTS, 2, generator=generator) * 2.5
    locations = torch.cat(reference)[None, :, None, None, None] + offsets / torch.tensor(shapes).flip(1)[:, None]
    weights = torch.rand(1, tokens, HEADS, len(shapes) * POINTS, generator=generator).softmax(-1)
    value = torch.randn(1, tokens, HEADS, HEAD_DIM, generator=generator)
    return (
        value.to(device, dtype),
        shapes,
        locations.to(device, wide),
        weights.view(locations.shape[:-1]).to(device, wide),
    )


def operator_of(side: str) -> Callable[..., Tensor]:
    """What computes one side: a backend of ours, or the package's operator."""
    return package_operator() if side == PACKAGE else partial(ms_deform_attn, backend=side)


def inputs_of(side: str, inputs: tuple) -> tuple:
    """What a side takes: the package asks for tensors alone, and for one dtype; converting them is not measured."""
    if side != PACKAGE:
        return inputs
    value, shapes, locations, weights = inputs
    spatial_shapes = torch.tensor(shapes, device=value.device)
    sizes = spatial_shapes.prod(1)
    return value, spatial_shapes, sizes.cumsum(0) - sizes, locations.to(value.dtype), weights.to(value.dtype)


def run_once(operator: Callable[..., Tensor], inputs: tuple, with_backward: bool) -> list[Tensor]:
    """One call; returns what it made, the output and the gradients."""
    if not with_backward:
        with torch.no_grad():
            return [operator(*inputs)]
    value, *between, locations, weights = inputs  # between them is what says of what shapes the levels are
    leaves = [x.detach().requires_grad_() for x in (value, locations, weights)]
    output = operator(leaves[0], *between, *leaves[1:])
    output.backward(torch.ones_like(output))
    return [output, *(x.grad for x in leaves)]


def return_freed_memory() -> None:
    """What is freed leaves this process, so that the next is seen: M_MMAP_THRESHOLD of glibc."""
    ctypes.CDLL(None).mallopt(-3, 1 << 16)


def extra_memory(
    strides: tuple[int, ...], dtype: torch.dtype, device: str, threads: int, side: str, with_backward: bool
) -> int | None:
    """Bytes that a call needs beyond its inputs and results, at the worst moment. For a process of its own."""
    if device == "cpu":
        return_freed_memory()
    torch.set_num_threads(threads)
    operator = operator_of(side)
    # Libraries and threads take their memory once.
    run_once(operator, inputs_of(side, make_inputs((64,), dtype, device)), with_backward)
    inputs = inputs_of(side, make_inputs(strides, dtype, device))
    probe = MemoryProbe(device)
    probe.restart()
    results = run_once(operator, inputs, with_backward)
    peak = probe.peak()
    if peak is None:
        return None
    made = sum(x.numel() * x.element_size() for x in results)
    made += results[0].numel() * results[0].element_size() if with_backward else 0  # the output's gradient
    return max(0, peak - made)


def measure(size: str, dtype: torch.dtype, device: str, threads: int, sides: list[str], repeat: int) -> dict:
    """Alternate the sides; returns the seconds of every run and the extra memory, by pass and side."""
    inputs = make_inputs(SIZES[size], dtype, device)
    operators = {side: (operator_of(side), inputs_of(side, inputs)) for side in sides}
    finish = finisher(device)
    result = {"size": size, "tokens": inputs[0].shape[1], "dtype": str(dtype).removeprefix("torch."), "passes": {}}
    for name in PASSES:
        with_backward = name != "forward"
        seconds = {side: [] for side in sides}
        for turn in range(repeat + 1):  # the first one warms up
            for side, (operator, its_inputs) in operators.items():
                finish()
                start = time.perf_counter()
                run_once(operator, its_inputs, with_backward)
                finish()
                if turn:
                    seconds[side].append(time.perf_counter() - start)
        memory = {}
        for side in sides:
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                task = pool.submit(extra_memory, SIZES[size], dtype, device, threads, side, with_backward)
                memory[side] = task.result()
        medians = [statistics.median(seconds[side]) for side in sides]
        result["passes"][name] = {"seconds": seconds, "extra_bytes": memory, "ratio": medians[1] / medians[0]}
    return result


def benchmark_op(args: argparse.Namespace) -> None:
    """The command ``op``."""
    torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU")
    if (args.device, args.dtype) in (("cpu", "float16"), ("cuda", "float64")):
        raise InputError(f"--dtype {args.dtype}: only plain PyTorch computes it on {args.device}")
    fastest, why = active_backend(args.device)
    if fastest == "eager":
        raise InputError(f"there is nothing to compare {args.against} with: {why}")
    if args.against == PACKAGE:
        package_operator()
    sides = [fastest, args.against]
    machine = describe_machine(args.device, args.threads)
    report = {"command": "op", "backend": why, "machine": machine, "results": []}
    print(f"{machine_line(machine)}\nour side: {why}\n", flush=True)
    rows, bars = [], {}
    for size in args.sizes:
        result = measure(size, getattr(torch, args.dtype), args.device, args.threads, sides, args.repeat)
        report["results"].append(result)
        for name, measured in result["passes"].items():
            for side in sides:
                extra = measured["extra_bytes"][side]
                median, limits = spread(measured["seconds"][side])
                row = {"size": f"{size} ({result['tokens']} tokens)", "dtype": args.dtype, "pass": name, "side": side}
                row |= {"median": median, "fastest to slowest": limits}
                row["memory beyond inputs and results"] = "unknown" if extra is None else f"{extra / 2**20:.0f} MiB"
                row["time / ours"] = f"{measured['ratio']:.1f}" if side != fastest else "1"
                rows.append(row)
                bars.setdefault(side, {})[f"{size}\n{name}"] = measured["seconds"][side]
    print_table(rows)
    if args.output:
        title = f"deformable attention, {args.dtype}"
        save(report, plot_bars(title, {"seconds": bars}), args.output)
