#!/usr/bin/env python
"""Measure the project's speed and memory: medians of alternating runs, on a machine that does nothing else.

python tools/benchmark.py op --threads 2 --output op.json     # deformable attention: compiled kernels and eager code
python tools/benchmark.py op --device cuda --dtype bfloat16   # the same on a GPU: Triton's kernels
"""

import argparse
import ctypes
import json
import os
import statistics
import sys
import time
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

import torch

from codetr_d2.errors import InputError
from codetr_d2.ops import active_backend, ms_deform_attn, set_backend

# The encoder of a model with 256 channels in 8 heads, 4 points and levels of these strides, on one image of 800 x 1333.
SIZES = {"encoder-4": (8, 16, 32, 64), "encoder-5": (4, 8, 16, 32, 64)}
IMAGE_SIZE = (800, 1333)
HEADS, HEAD_DIM, POINTS = 8, 32, 4
PASSES = ("forward", "forward + backward")


def make_inputs(strides, dtype, device="cpu"):
    """Self-attention of all tokens: each samples points about its own place, 2.5 cells of the level away on average."""
    generator = torch.Generator().manual_seed(0)
    shapes = [(-(-IMAGE_SIZE[0] // stride), -(-IMAGE_SIZE[1] // stride)) for stride in strides]
    spatial_shapes = torch.tensor(shapes)
    sizes = spatial_shapes.prod(1)
    tokens = int(sizes.sum())
    # bfloat16 is what autocast makes of the values; locations and weights stay float32.
    wide = torch.promote_types(dtype, torch.float32)
    reference = [
        torch.cartesian_prod((torch.arange(h) + 0.5) / h, (torch.arange(w) + 0.5) / w).flip(1) for h, w in shapes
    ]
    offsets = torch.randn(1, tokens, HEADS, len(shapes), POINTS, 2, generator=generator) * 2.5
    locations = torch.cat(reference)[None, :, None, None, None] + offsets / spatial_shapes.flip(1)[:, None]
    weights = torch.rand(1, tokens, HEADS, len(shapes) * POINTS, generator=generator).softmax(-1)
    value = torch.randn(1, tokens, HEADS, HEAD_DIM, generator=generator)
    return (
        value.to(device, dtype),
        spatial_shapes.to(device),
        (sizes.cumsum(0) - sizes).to(device),
        locations.to(device, wide),
        weights.view(locations.shape[:-1]).to(device, wide),
    )


def run_once(inputs, with_backward):
    """One call; returns what it made, the output and the gradients."""
    if not with_backward:
        with torch.no_grad():
            return [ms_deform_attn(*inputs)]
    leaves = [x.detach().requires_grad_() if x.is_floating_point() else x for x in inputs]
    output = ms_deform_attn(*leaves)
    output.backward(torch.ones_like(output))
    return [output, *(x.grad for x in leaves if x.requires_grad)]


def bytes_made(results, with_backward):
    made = sum(x.numel() * x.element_size() for x in results)
    return made + (results[0].numel() * results[0].element_size() if with_backward else 0)  # the output's gradient


def peak_extra_gpu_memory(inputs, with_backward):
    """Bytes that a call needs on the GPU beyond its inputs and results, at the worst moment."""
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    results = run_once(inputs, with_backward)
    return max(0, torch.cuda.max_memory_allocated() - before - bytes_made(results, with_backward))


def peak_extra_memory(size, dtype, threads, backend, with_backward):
    """The same on the CPU. For a process of its own. None where the system can't tell: it takes Linux."""
    status, reset = Path("/proc/self/status"), Path("/proc/self/clear_refs")
    if not status.exists() or not os.access(reset, os.W_OK):
        return None

    def resident(field):
        return next(int(line.split()[1]) * 1024 for line in status.read_text().splitlines() if line.startswith(field))

    # M_MMAP_THRESHOLD: what is freed leaves the process, so that the next is seen.
    ctypes.CDLL(None).mallopt(-3, 1 << 16)
    torch.set_num_threads(threads)
    set_backend(backend)
    run_once(make_inputs((64,), dtype), with_backward)  # libraries and threads take their memory once
    inputs = make_inputs(SIZES[size], dtype)
    before = resident("VmRSS")
    reset.write_text("5")  # forget the highest value so far
    results = run_once(inputs, with_backward)
    return max(0, resident("VmHWM") - before - bytes_made(results, with_backward))


def measure_op(size, dtype, device, threads, backends, repeat):
    """Alternate the backends; returns the seconds of every run and the extra memory, by pass and backend."""
    inputs = make_inputs(SIZES[size], dtype, device)
    finish = torch.cuda.synchronize if device == "cuda" else lambda: None  # a GPU is only told what to do
    result = {"size": size, "tokens": inputs[0].shape[1], "dtype": str(dtype).removeprefix("torch."), "passes": {}}
    for name in PASSES:
        with_backward = name != "forward"
        seconds = {backend: [] for backend in backends}
        for turn in range(repeat + 1):  # the first one warms up
            for backend in backends:
                set_backend(backend)
                finish()
                start = time.perf_counter()
                run_once(inputs, with_backward)
                finish()
                if turn:
                    seconds[backend].append(time.perf_counter() - start)
        memory = {}
        for backend in backends:
            if device == "cuda":
                set_backend(backend)
                memory[backend] = peak_extra_gpu_memory(inputs, with_backward)
                continue
            with ProcessPoolExecutor(1, mp_context=get_context("spawn")) as pool:
                memory[backend] = pool.submit(peak_extra_memory, size, dtype, threads, backend, with_backward).result()
        medians = [statistics.median(seconds[backend]) for backend in backends]
        result["passes"][name] = {"seconds": seconds, "extra_bytes": memory, "ratio": medians[1] / medians[0]}
    return result


def describe(seconds, extra_bytes):
    memory = "  unknown" if extra_bytes is None else f"{extra_bytes / 2**20:6.0f} MiB"
    milliseconds = [1000 * x for x in seconds]
    return f"{statistics.median(milliseconds):8.1f} ms ({min(milliseconds):.1f} to {max(milliseconds):.1f}), {memory}"


def benchmark_op(args):
    torch.set_num_threads(args.threads)
    if args.device == "cuda" and not torch.cuda.is_available():
        raise InputError("--device cuda: PyTorch finds no GPU")
    if (args.device, args.dtype) in (("cpu", "float16"), ("cuda", "float64")):
        raise InputError(f"--dtype {args.dtype}: only plain PyTorch computes it on {args.device}")
    fastest, why = active_backend(args.device)
    if fastest == args.against:
        raise InputError(f"there is nothing to compare {args.against} with: {why}")
    backends = (fastest, args.against)
    report = {
        "torch": torch.__version__,
        "backend": why,
        "device": torch.cuda.get_device_name() if args.device == "cuda" else "cpu",
        "threads": args.threads,
        "load_before": os.getloadavg()[0],
        "results": [],
    }
    where = f"{report['device']}, {args.threads} threads"
    print(f"torch {torch.__version__}, {where}, {why}, load {report['load_before']:.1f}")
    print("median (fastest to slowest) of each pass, and the memory it needs beyond inputs and results")
    for size in args.sizes:
        result = measure_op(size, getattr(torch, args.dtype), args.device, args.threads, backends, args.repeat)
        report["results"].append(result)
        print(f"\n{size}: {result['tokens']} tokens, {args.dtype}")
        for name, measured in result["passes"].items():
            for backend in backends:
                text = describe(measured["seconds"][backend], measured["extra_bytes"][backend])
                print(f"  {name:18}  {backend:6} {text}")
            print(f"  {name:18}  {backends[1]} / {backends[0]} = {measured['ratio']:.1f}")
    if args.output:
        args.output.write_text(json.dumps(report, indent=2) + "\n")


def positive(text):
    number = int(text)
    if number < 1:
        raise argparse.ArgumentTypeError(f"must be at least 1, got {number}")
    return number


def size_names(text):
    names = text.split(",")
    for name in names:
        if name not in SIZES:
            raise argparse.ArgumentTypeError(f"{name!r} is not one of {', '.join(SIZES)}")
    return names


def main():
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True, metavar="COMMAND")
    op = commands.add_parser("op", help="the deformable attention operator, forward and backward")
    op.add_argument("--against", choices=("eager",), default="eager", help="what the fastest backend is compared with")
    op.add_argument("--device", choices=("cpu", "cuda"), default="cpu", help="cuda compares Triton's kernels")
    dtypes = ("float32", "bfloat16", "float16", "float64")
    op.add_argument("--dtype", choices=dtypes, default="float32", help="of the values")
    op.add_argument("--threads", type=positive, default=torch.get_num_threads(), help="CPU threads")
    op.add_argument("--sizes", type=size_names, default=["encoder-4"], help="comma-separated: " + ", ".join(SIZES))
    op.add_argument("--repeat", type=positive, default=5, help="timed runs of each backend and pass")
    op.add_argument("--output", type=Path, help="write all times to this JSON file too")
    op.set_defaults(run=benchmark_op)
    args = parser.parse_args()
    output = getattr(args, "output", None)
    if output is not None and not output.absolute().parent.is_dir():
        parser.error(f"--output {output}: its folder does not exist")
    try:
        args.run(args)
    except InputError as error:
        sys.exit(f"error: {error}")


if __name__ == "__main__":
    main()
