"""Where bfloat16 is faster than float32."""

import functools
import logging
from pathlib import Path

import torch

__all__ = ["fast_bfloat16", "inference_dtype"]

logger = logging.getLogger(__name__)

MIN_CAPABILITY = (8, 0)  # of NVIDIA's GPUs: the first whose matrix units take bfloat16


def fast_bfloat16(device: torch.device | str) -> tuple[bool, str]:
    """Whether matrix products on ``device`` are faster in bfloat16 than in float32, by what its processor has.

    CPUs need AMX: those that have AVX-512 BF16 alone take longer than in float32.

    Returns:
        The answer, and what it rests on as a phrase for people.
    """
    device = torch.device(device)
    if device.type == "cpu":
        return (True, "this CPU has AMX") if _cpu_has_amx() else (False, "this CPU has no AMX")
    if device.type == "cuda":
        capability = torch.cuda.get_device_capability(device)
        return capability >= MIN_CAPABILITY, "compute capability {}.{}".format(*capability)
    return False, f"nothing is known of {device.type}"


def inference_dtype(wanted: torch.dtype | None, device: torch.device) -> torch.dtype:
    """What a model on ``device`` computes in at inference: what is wanted; for None, whichever is faster there.

    Warns once where bfloat16 is wanted and is slower.
    """
    if wanted is None:
        return torch.bfloat16 if fast_bfloat16(device)[0] else torch.float32
    if wanted == torch.bfloat16 and not fast_bfloat16(device)[0]:
        _warn_of_slow_bfloat16(device)
    return wanted


@functools.cache
def _warn_of_slow_bfloat16(device: torch.device) -> None:
    logger.warning(
        "MODEL.CODETR.INFERENCE_DTYPE is bfloat16, which is slower than float32 on %s (%s); auto takes the faster one",
        device,
        fast_bfloat16(device)[1],
    )


@functools.cache
def _cpu_has_amx() -> bool:
    """Whether the CPU multiplies matrices of bfloat16 in hardware; told on Linux alone."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return False
    return any("amx_bf16" in line.split() for line in lines if line.startswith("flags"))
