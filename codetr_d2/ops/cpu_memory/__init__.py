"""How the process deals with freed memory on the CPU."""

import torch

from ..library import library_is_loaded

__all__ = ["keep_freed_memory"]


def keep_freed_memory() -> None:
    """Keep the memory of freed CPU tensors for the next ones, in this process, from now on.

    By default large tensors are new memory of the system's, which zeroes it at the first touch. What is kept makes the
    process larger by at most a quarter of what its tensors needed at once at the worst moment, and 384 MiB at most.
    Without the compiled library it does nothing.

    This changes the process, all of PyTorch in it, so it is for programs to call, and for no model.
    """
    if library_is_loaded():
        torch.ops.codetr_d2._keep_freed_memory()
