"""Processes that a rank starts, and that must not live on without it."""

import contextlib
import ctypes
import multiprocessing
import os
import signal
import threading
from collections.abc import Iterator
from multiprocessing import forkserver, resource_tracker

_PR_SET_PDEATHSIG = 1


def end_with_parent() -> None:
    """Let the kernel end this process when the one that started it ends, however it does.

    A rank that is killed cannot end its helpers. They would hold its output open, and a pipe behind it
    would never end.
    """
    ctypes.CDLL(None, use_errno=True).prctl(_PR_SET_PDEATHSIG, signal.SIGKILL)
    parent = multiprocessing.parent_process()
    if parent is None:
        return
    if not parent.is_alive():  # it has ended before this call
        os.kill(os.getpid(), signal.SIGKILL)
    # A fork server may have started this process, and lives as long as it.
    if parent.pid != os.getppid():
        threading.Thread(target=_end_after, args=(parent,), daemon=True).start()


@contextlib.contextmanager
def started_deaf_to(number: signal.Signals) -> Iterator[None]:
    """Processes that are started in this context do not get a signal, nor do those that they start.

    Slurm sends the signal that asks ranks to save and to stop to every process of a step, and most
    programs end at it. Python's fork server and resource tracker are started here too: they serve
    all that comes later.
    """
    before = signal.pthread_sigmask(signal.SIG_BLOCK, [number])  # exec and fork keep it
    try:
        resource_tracker.ensure_running()
        signal.pthread_sigmask(signal.SIG_BLOCK, [number])  # that one has let SIGTERM pass again
        forkserver.ensure_running()
        yield
    finally:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)


def _end_after(parent) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
