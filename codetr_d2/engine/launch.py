"""Several processes on GPUs (NCCL) or on the CPU (gloo), and signals, one of which ends them all."""

import contextlib
import logging
import multiprocessing
import os
import re
import signal
import socket
import threading
import time
from collections.abc import Callable, Iterator
from multiprocessing import resource_tracker

import torch
import torch.distributed as dist
from detectron2.engine import DEFAULT_TIMEOUT
from detectron2.utils import comm
from torch.multiprocessing import ProcessExitedException, ProcessRaisedException, start_processes

from ..errors import InputError

__all__ = ["Terminated", "run_processes"]

_GRACE = 10  # seconds in which a process may write what is done


class Terminated(KeyboardInterrupt):
    """SIGTERM, which ends the work as Ctrl-C does."""


_SIGNALS = {signal.SIGINT: KeyboardInterrupt, signal.SIGTERM: Terminated}


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

    On the CPU the processes share the cores: each gets an equal part of the threads that torch would use here. SIGINT
    or SIGTERM to any of them, or to this process, ends all: ``KeyboardInterrupt`` or ``Terminated`` is raised in each,
    and what has not ended in ten seconds is killed.

    Args:
        main: a function at module level.
        num_processes: processes on this machine; on GPUs, one for each.
        device: "cpu" or "cuda".
        num_machines, machine_rank, dist_url: as in detectron2's ``launch``.
        args: arguments for ``main``, which must be picklable.

    Raises:
        InputError: as it was raised in one of the processes; or one was killed.
        KeyboardInterrupt, Terminated: after such a signal, when all processes have ended.
    """
    world_size = num_processes * num_machines
    if world_size == 1:
        with _handling(_raise_here(os.getpid()), signal.SIGTERM):
            main(*args)
        return
    if dist_url == "auto":
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            dist_url = f"tcp://127.0.0.1:{free.getsockname()[1]}"
    num_threads = max(1, torch.get_num_threads() // num_processes) if device == "cpu" else None
    group = {"init_method": dist_url, "world_size": world_size, "backend": "gloo" if device == "cpu" else "nccl"}
    logging.getLogger("torch.multiprocessing.spawn").setLevel(logging.ERROR)  # that it ends the others of a failed one

    processes: list = []
    received: list[int] = []

    def stop(signum: int, frame: object) -> None:
        if received or any(process.exitcode for process in processes):
            return  # all end already, and those that are told to pass it on
        received.append(signum)
        for process in processes:
            process.terminate()

    start_method = multiprocessing.get_start_method()
    worker_args = (main, args, num_processes, machine_rank, group, num_threads, start_method)
    with _handling(stop, *_SIGNALS):
        resource_tracker.ensure_running()  # it would unblock the signal
        # Inherited by the processes, in which SIGINT so waits until they have imported all.
        signal.pthread_sigmask(signal.SIG_BLOCK, [signal.SIGINT])
        try:
            context = start_processes(_worker, worker_args, num_processes, join=False)
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
        processes += context.processes
        try:
            while not received and not context.join(timeout=1):
                pass
        except (ProcessRaisedException, ProcessExitedException) as error:
            if not received:
                raise _named(error) from None
        finally:
            _end(processes)
            for path in context.error_files:
                with contextlib.suppress(FileNotFoundError):
                    os.remove(path)
    if received:
        raise _SIGNALS[received[0]]


def _worker(
    local_rank: int,
    main: Callable,
    args: tuple,
    num_processes: int,
    machine_rank: int,
    group: dict,
    num_threads: int | None,
    start_method: str,
) -> None:
    """One of the processes. SIGINT waits, and SIGTERM ends it at once, until there is something to write."""
    # Of what loads its data: as in a single process, instead of as itself, which takes seconds at each start and end.
    multiprocessing.set_start_method(start_method, force=True)
    if num_threads:
        torch.set_num_threads(num_threads)
    dist.init_process_group(rank=machine_rank * num_processes + local_rank, timeout=DEFAULT_TIMEOUT, **group)
    comm.create_local_process_group(num_processes)
    if group["backend"] == "nccl":
        torch.cuda.set_device(local_rank)
    comm.synchronize()
    stop = _raise_here(os.getpid(), multiprocessing.parent_process().pid)
    for each in _SIGNALS:
        signal.signal(each, stop)
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGINT])
    main(*args)


def _raise_here(pid: int, parent: int | None = None) -> Callable:
    """A handler that raises in the process ``pid``, once, and passes the signal on to its parent."""
    raised = []  # another signal, like the parent's answer, must not interrupt the writing of what is done

    def stop(signum: int, frame: object) -> None:
        if os.getpid() != pid:  # forked from it by a library: as if there were no handler
            if signum == signal.SIGINT:
                raise KeyboardInterrupt
            signal.signal(signum, signal.SIG_DFL)
            os.kill(os.getpid(), signum)
        elif not raised:
            raised.append(signum)
            # torch's handler would raise for loading processes that the signal has ended too.
            signal.signal(signal.SIGCHLD, lambda *_: None)
            if parent is not None and os.getppid() == parent:
                os.kill(parent, signum)
            raise _SIGNALS[signum]

    return stop


@contextlib.contextmanager
def _handling(handler: Callable, *signals: int) -> Iterator[None]:
    """Handle signals so; in the main thread, as no other may."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {each: signal.signal(each, handler) for each in signals}
    try:
        yield
    finally:
        for each, previous in before.items():
            signal.signal(each, signal.SIG_DFL if previous is None else previous)


def _end(processes: list) -> None:
    """End the processes that still run."""
    for process in processes:
        process.terminate()
    deadline = time.monotonic() + _GRACE
    for process in processes:
        process.join(max(0, deadline - time.monotonic()))
        if process.is_alive():
            process.kill()
            process.join()


def _named(error: ProcessRaisedException | ProcessExitedException) -> Exception:
    """What to raise for the failure of a process."""
    if isinstance(error, ProcessExitedException):
        return InputError(
            f"process {error.error_index} was ended ({error.signal_name or f'exit code {error.exit_code}'}); SIGKILL "
            "mostly means that the memory did not suffice: lower SOLVER.IMS_PER_BATCH or DATALOADER.NUM_WORKERS"
        )
    # Its message is the traceback of the process.
    message = re.search(r"^codetr_d2\.errors\.InputError: (.*)", str(error), re.MULTILINE | re.DOTALL)
    return error if message is None else InputError(message[1].strip())
