"""Ranks that live through many tests: on a GPU, starting them takes longer than most tests.

Each rank is a process that has imported Megatron and, on a GPU, holds a CUDA context. It serves one
task after another, and between them forgets what Megatron keeps in globals. What a process reads only
once (``CUDA_DEVICE_MAX_CONNECTIONS``, cuBLAS' settings) belongs to a set of ranks of its own.
"""

import contextlib
import gc
import os
import sys
import time
import traceback
from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor
from multiprocessing.connection import Connection
from typing import Any


class RankFailure(AssertionError):
    """Some ranks raised, died or did not come to an end; the message holds their tracebacks."""


class ResidentRanks:
    """A set of ranks, started at once and in the background.

    Args:
        context: of multiprocessing; it says how the processes are made.
        size: number of ranks; a task may use the first of them alone.
        environment: variables that hold from the start of the processes.
    """

    PATIENCE_S = 5
    """How long the other ranks may go on once one has failed."""

    def __init__(self, context, size: int, environment: Mapping[str, str] | None = None):
        self._context = context
        self._size = size
        self._environment = dict(environment or {})
        self._ranks: list[tuple] = []
        self._start()

    def call(
        self,
        function: Callable,
        world_size: int,
        timeout_s: float,
        *args,
        is_failure: Callable[[Any], bool] = lambda value: False,
    ) -> list:
        """Call ``function(rank, *args)`` on the first ``world_size`` ranks.

        Args:
            function: importable by name.
            is_failure: whether a rank that returned this has left the others waiting.

        Returns:
            What each rank returned, by rank.

        Raises:
            RankFailure: if a rank raised, died, or took longer than ``timeout_s``. A set whose ranks
                cannot serve any longer is started anew.
        """
        for rank, (_, connection) in enumerate(self._ranks[:world_size]):
            connection.send((function, (rank, *args)))
        returned, failures = self._collect(world_size, time.monotonic() + timeout_s, is_failure)
        if len(returned) + len(failures) < world_size:  # the others wait for what never comes
            missing = sorted(set(range(world_size)) - returned.keys() - failures.keys())
            self.close()
            self._start()
            if not failures:
                raise RankFailure(f"ranks {missing} died or were still at work")
        if failures:
            raise RankFailure("\n".join(f"rank {rank}:\n{text}" for rank, text in failures.items()))
        return [returned[rank] for rank in range(world_size)]

    def close(self) -> None:
        """End the processes."""
        for process, connection in self._ranks:
            connection.close()
            process.kill()
            process.join()
        self._ranks = []

    def _start(self) -> None:
        for rank in range(self._size):
            ours, theirs = self._context.Pipe()
            # No daemon: saving a checkpoint starts a process. It ends when the connection closes.
            process = self._context.Process(target=_serve, args=(rank, theirs, self._environment))
            process.start()
            theirs.close()
            self._ranks.append((process, ours))

    def _collect(self, world_size: int, deadline: float, is_failure) -> tuple[dict, dict]:
        """What ranks return, and their tracebacks, until all have answered or time is up."""
        returned, failures = {}, {}
        waiting = dict(enumerate(self._ranks[:world_size]))
        while waiting and time.monotonic() < deadline:
            for rank, (process, connection) in list(waiting.items()):
                if not connection.poll(0.01) and process.is_alive():
                    continue
                del waiting[rank]
                with contextlib.suppress(EOFError, ConnectionError):
                    value, failure = connection.recv()
                    if failure is not None:
                        failures[rank] = failure
                    else:
                        returned[rank] = value
                        if not is_failure(value):
                            continue
                deadline = min(deadline, time.monotonic() + self.PATIENCE_S)
        return returned, failures


def destroy_process_groups() -> None:
    """All of them at once: one after the other, NCCL's take seconds."""
    import torch
    from torch.distributed import distributed_c10d

    groups = [
        group for group in distributed_c10d._world.pg_map if group != distributed_c10d.group.WORLD
    ]
    arguments = {}
    if torch.cuda.is_initialized():  # a thread begins on the first GPU
        device = torch.cuda.current_device()
        arguments = dict(initializer=torch.cuda.set_device, initargs=(device,))
    with ThreadPoolExecutor(len(groups) + 1, **arguments) as pool:
        list(pool.map(torch.distributed.destroy_process_group, groups))
    torch.distributed.destroy_process_group()


def _serve(rank: int, connection: Connection, environment: dict[str, str]) -> None:
    os.environ |= environment
    os.environ.setdefault("TRITON_CACHE_AUTOTUNING", "1")  # what one set has measured serves all
    import torch

    from megatron_scmoe.platform import cpu_backend, log_filters
    from tests import preload  # noqa: F401  (imports Megatron)

    log_filters.install()

    if not cpu_backend.is_enabled():
        torch.cuda.set_device(rank)
        torch.zeros(1, device="cuda")
    before = dict(os.environ), list(sys.argv)
    while True:
        try:
            function, args = connection.recv()
        except (EOFError, ConnectionError):
            return
        try:
            answer = function(*args), None
        except BaseException:
            answer = None, traceback.format_exc()
        _forget(*before)
        connection.send(answer)


def _forget(environment: dict[str, str], argv: list[str]) -> None:
    """Reset what a task leaves behind in the process; Megatron's own list, and what it omits."""
    import torch
    from megatron.core.tensor_parallel import random
    from megatron.core.transformer.moe.moe_logging import destroy_moe_metrics_tracker
    from megatron.training import training

    training.destroy_global_state()
    # A rank that has the time of a former start agrees on it with the others, who may have none.
    training._STARTUP_TIMESTAMPS.update(dict.fromkeys(training._STARTUP_TIMESTAMPS))
    destroy_moe_metrics_tracker()
    random._CUDA_RNG_STATE_TRACKER = None
    random._CUDA_RNG_STATE_TRACKER_INITIALIZED = False
    if torch.distributed.is_initialized():
        destroy_process_groups()
    torch.use_deterministic_algorithms(False)
    os.environ.clear()
    os.environ.update(environment)
    sys.argv[:] = argv
    gc.collect()
    torch.cuda.empty_cache()
