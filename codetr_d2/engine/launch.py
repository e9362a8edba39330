"""Several processes on GPUs (NCCL) or on the CPU (gloo)."""

import os
import re
from collections.abc import Callable

import torch
from detectron2.engine import launch
from torch.multiprocessing import ProcessRaisedException

from ..errors import InputError

__all__ = ["run_processes"]


def _worker(main: Callable, num_threads: int | None, args: tuple) -> None:
    if num_threads:
        torch.set_num_threads(num_threads)
    main(*args)


def run_processes(
    main: Callable,
    num_processes: int,
    *,
    device: str,
    num_machines: int = 1,
    machine_rank: int = 0,
    dist_url: str = "auto",
    args: tuple = (),
) -> None:
    """Call ``main(*args)`` in every process; with a single one, in this process.

    On the CPU the processes share the cores: each gets an equal part of the threads that torch would use here.

    Args:
        main: a function at module level.
        num_processes: processes on this machine; on GPUs, one for each.
        device: "cpu" or "cuda".
        num_machines, machine_rank, dist_url: as in detectron2's ``launch``.
        args: arguments for ``main``, which must be picklable.

    Raises:
        InputError: as it was raised in one of the processes.
    """
    num_threads = None
    if device == "cpu" and num_processes * num_machines > 1:
        num_threads = max(1, torch.get_num_threads() // num_processes)
        os.environ["CUDA_VISIBLE_DEVICES"] = ""  # detectron2's launch takes gloo where its processes see no GPU
    try:
        launch(_worker, num_processes, num_machines, machine_rank, dist_url, args=(main, num_threads, args))
    except ProcessRaisedException as error:  # its message is the traceback of the process
        message = re.search(r"^codetr_d2\.errors\.InputError: (.*)", str(error), re.MULTILINE | re.DOTALL)
        if message is None:
            raise
        raise InputError(message[1].strip()) from None
