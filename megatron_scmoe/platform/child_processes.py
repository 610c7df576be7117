"""Processes that a rank starts, and that must not live on without it."""

import ctypes
import multiprocessing
import os
import signal
import threading

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


def _end_after(parent) -> None:
    parent.join()
    os.kill(os.getpid(), signal.SIGKILL)
