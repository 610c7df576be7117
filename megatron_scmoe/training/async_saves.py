"""Asynchronous saves with Megatron's own writer (``--async-strategy mcore``), made to end.

A rank hands a checkpoint to a process of its own, which writes while training goes on. If that process
ends, Megatron waits for it for ever; if the rank is killed, the process stays. And what already lies in
the host's memory is written as it is by then: with the next step in it.
"""

import atexit
import functools
import signal
import threading
import time
from multiprocessing import get_context
from multiprocessing.managers import SyncManager

import torch
from megatron.core.dist_checkpointing.strategies import async_utils, filesystem_async
from megatron.core.dist_checkpointing.strategies.filesystem_async import WriteBucket

from megatron_scmoe.platform import cpu_backend
from megatron_scmoe.platform.child_processes import end_with_parent, started_deaf_to
from megatron_scmoe.training.failed_saves import SaveError

_plain_loop = async_utils.PersistentAsyncCaller.async_loop
_plain_preload = filesystem_async.FileSystemWriterAsync.preload_tensors


def install(exit_signal: signal.Signals) -> None:
    """Let Megatron's writer end with its rank, the rank with its writer, and copy what it is given.

    Args:
        exit_signal: at which a rank saves and stops (``--exit-signal``); the writer goes on.
    """
    with started_deaf_to(exit_signal):  # the writer's process comes of the fork server
        _share_results()
    atexit.register(_kill_writer)
    filesystem_async.FileSystemWriterAsync.preload_tensors = staticmethod(copied_to_host)
    caller = async_utils.PersistentAsyncCaller
    caller.async_loop = staticmethod(write_until_done)
    caller.schedule_async_call = _with_a_living_writer(caller.schedule_async_call)
    caller.is_current_async_call_done = _without_waiting_for_ever(caller.is_current_async_call_done)


def write_until_done(*args) -> None:
    """The writer's process: Megatron's loop."""
    end_with_parent()
    cpu_backend.enable_if_no_gpu()
    _plain_loop(*args)


def copied_to_host(
    write_buckets: list[WriteBucket], non_blocking: bool = True
) -> list[WriteBucket]:
    """Tensors as they are now, in the writer's process, while its rank waits; training changes its own.

    Megatron's copies those on a GPU. Of others the process has what the rank has: shared memory.
    """
    own = []
    for file, key, (objects, tensors) in write_buckets:
        copies = [
            (item, tensor.clone() if tensor.device.type == "cpu" else tensor)
            for item, tensor in tensors
        ]
        own.append((file, key, (objects, copies)))
    return _plain_preload(own, non_blocking)


def _kill_writer() -> None:
    """At the end of a rank that failed, which would ask it to end by SIGTERM and wait."""
    process = async_utils.PersistentAsyncCaller._persistent_process
    if process is not None and process.is_alive():
        process.kill()


def _share_results() -> None:
    """The queue by which a writer answers; Megatron's is served by a process that stays."""
    manager = SyncManager(ctx=get_context("fork"))
    manager.start(initializer=end_with_parent)
    filesystem_async._results_queue = manager.Queue()


def _with_a_living_writer(plain):
    @functools.wraps(plain)
    def schedule_async_call(self, async_req):
        _check_writer()
        over = threading.Event()
        watcher = threading.Thread(target=_end_the_wait, args=(self, over))
        watcher.start()
        try:
            plain(self, async_req)
        finally:
            over.set()
            watcher.join()
        _check_writer()

    return schedule_async_call


def _end_the_wait(caller, over: threading.Event) -> None:
    """A rank waits until its writer has copied the tensors; if that one has ended, do as if it had."""
    process = async_utils.PersistentAsyncCaller._persistent_process
    while process is not None and not over.wait(0.1):
        if not process.is_alive():
            caller._persistent_preload_q.task_done()
            return


def _without_waiting_for_ever(plain):
    @functools.wraps(plain)
    def is_current_async_call_done(self, blocking=False, no_dist=False):
        while True:
            _check_writer()
            if plain(self, False, no_dist):  # the same on all ranks, which go round together
                return True
            if not blocking:
                return False
            time.sleep(0.1)

    return is_current_async_call_done


def _check_writer() -> None:
    process = async_utils.PersistentAsyncCaller._persistent_process
    if process is not None and not process.is_alive():
        rank = torch.distributed.get_rank()
        raise SaveError(
            f"--async-save: the process that writes the checkpoints of rank {rank} has ended with "
            f"status {process.exitcode} (-9: a kill, as by a kernel without memory); --load goes on "
            "from the last complete checkpoint"
        )
