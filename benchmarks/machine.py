"""What the benchmark's measurements are made on: the machine's properties, the clock, and memory."""

import os
import time
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path

import torch

__all__ = ["GIB", "MemoryProbe", "Stopwatch", "describe_machine", "finisher", "resident_bytes"]

GIB = 2**30
_STATUS, _RESET = Path("/proc/self/status"), Path("/proc/self/clear_refs")


def describe_machine(device: str, threads: int) -> dict:
    """Properties of the machine, and nothing that names it."""
    cpuinfo, meminfo = Path("/proc/cpuinfo"), Path("/proc/meminfo")
    lines = cpuinfo.read_text().splitlines() if cpuinfo.exists() else []
    flags = set(next((line for line in lines if line.startswith("flags")), "").split())
    known = {
        "AVX2": "avx2",
        "AVX-512": "avx512f",
        "AVX-512 VNNI": "avx512_vnni",
        "AVX-512 bfloat16": "avx512_bf16",
        "AMX bfloat16": "amx_bf16",
    }
    total = meminfo.read_text().split()[1] if meminfo.exists() else None  # the first line is MemTotal, in kB
    return {
        "cpu_features": [name for name, flag in known.items() if flag in flags],
        "cores": os.cpu_count(),
        "memory_gib": None if total is None else round(int(total) * 1024 / GIB, 1),
        "gpu": torch.cuda.get_device_name() if device == "cuda" else None,
        "torch": torch.__version__,
        "threads": threads,
        "load_before": os.getloadavg()[0],
    }


def finisher(device: str) -> Callable[[], None]:
    """What waits until the device has done what it was told to do."""
    return torch.cuda.synchronize if device == "cuda" else lambda: None


def resident_bytes(field: str) -> int | None:
    """Main memory of this process, ``VmRSS`` now or ``VmHWM`` at most. None where the system can't tell."""
    if not _STATUS.exists():
        return None
    return next(int(line.split()[1]) * 1024 for line in _STATUS.read_text().splitlines() if line.startswith(field))


class MemoryProbe:
    """The most memory at one time, from :meth:`restart` on, beyond what this process held when the probe was made.

    On the CPU that is resident memory, on a GPU what PyTorch has allocated there.
    """

    def __init__(self, device: str):
        self.on_gpu = device == "cuda"
        self.works = self.on_gpu or (_STATUS.exists() and os.access(_RESET, os.W_OK))
        self.before = torch.cuda.memory_allocated() if self.on_gpu else resident_bytes("VmRSS")

    def restart(self) -> None:
        """Forget the highest value so far."""
        if self.on_gpu:
            torch.cuda.reset_peak_memory_stats()
        elif self.works:
            _RESET.write_text("5")

    def peak(self) -> int | None:
        """Bytes; None where the system can't tell: it takes Linux."""
        if not self.works:
            return None
        return max(0, (torch.cuda.max_memory_allocated() if self.on_gpu else resident_bytes("VmHWM")) - self.before)


class Stopwatch:
    """Divides the time since its start into laps, and adds up the seconds of those with one name.

    Args:
        finish: waits for the device.
    """

    def __init__(self, finish: Callable[[], None] = lambda: None):
        self.finish = finish
        self.restart()

    def restart(self) -> None:
        """Forget the seconds so far."""
        self.seconds: dict[str, float] = defaultdict(float)
        self.finish()
        self.since = time.perf_counter()

    def lap(self, name: str) -> None:
        """What has passed since the last lap belongs to ``name``."""
        self.finish()
        now = time.perf_counter()
        self.seconds[name] += now - self.since
        self.since = now
