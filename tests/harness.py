"""Run functions, and the pretraining script, on several ranks.

Over gloo, ranks are forked from a server that has imported Megatron already (tests/preload.py); a test
on two ranks then costs tenths of a second instead of ten. CUDA does not survive a fork: on GPUs the
ranks are resident (tests/resident.py).
"""

import atexit
import contextlib
import functools
import os
import re
import sys
import tempfile
import traceback
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from multiprocessing import get_context, set_start_method
from pathlib import Path

from megatron_scmoe.platform import cpu_backend, launch
from tests.resident import RankFailure, ResidentRanks, destroy_process_groups

cpu_backend.enable_if_no_gpu()

TIMEOUT_S = 300
"""Longest run of any test's ranks; a hang is a failure."""

PATIENCE_S = 12
"""How long the other ranks may go on once one has failed; two cores run several ranks at a time."""

_context = get_context("forkserver" if cpu_backend.is_enabled() else "spawn")
if cpu_backend.is_enabled():
    _context.set_forkserver_preload(["tests.preload"])


MAX_GPUS = 4
"""A test uses no more."""


def gpu_ranks(environment: Mapping[str, str] | None = None) -> ResidentRanks:
    """The resident ranks on the GPUs here that were started with these variables."""
    return _gpu_ranks(tuple(sorted((environment or {}).items())))


@functools.cache
def _gpu_ranks(environment: tuple[tuple[str, str], ...]) -> ResidentRanks:
    import torch

    ranks = ResidentRanks(_context, min(torch.cuda.device_count(), MAX_GPUS), dict(environment))
    atexit.register(ranks.close)
    return ranks


def run_distributed(
    function,
    world_size: int,
    *args,
    backend: str = "gloo",
    environment: Mapping[str, str] | None = None,
    **kwargs,
) -> list:
    """Call ``function(*args, **kwargs)`` on ``world_size`` ranks with a process group.

    Args:
        function: importable by name; ``torch.distributed`` is initialised when it is called.
        world_size: number of ranks.
        environment: variables of the ranks, on GPUs from their start.

    Returns:
        What each rank returned, by rank.

    Raises:
        RankFailure: if a rank raised, died or was still running after ``TIMEOUT_S``.
    """
    with tempfile.TemporaryDirectory() as folder:
        task = (folder, backend, world_size, environment, function, args, kwargs)
        if not cpu_backend.is_enabled():
            return gpu_ranks(environment).call(_in_process_group, world_size, TIMEOUT_S, *task)
        return _run(world_size, _send_result, task)


@dataclass
class Run:
    """A finished run of the pretraining script.

    ``output`` is what all ranks printed, ``status`` the exit status of the first rank that failed.
    """

    status: int
    output: str

    @property
    def losses(self) -> dict[int, float]:
        """``lm loss`` by iteration, as printed (7 digits)."""
        return self._logged(r"lm loss: ([\d.E+-]+)")

    @property
    def grad_norms(self) -> dict[int, float]:
        """Gradient norm by iteration, as printed (3 decimals)."""
        return self._logged(r"grad norm: ([\d.]+)")

    @property
    def learning_rates(self) -> dict[int, float]:
        """Learning rate by iteration, as printed (7 digits)."""
        return self._logged(r"learning rate: ([\d.E+-]+)")

    def _logged(self, pattern: str) -> dict[int, float]:
        found = re.findall(r"iteration +(\d+)/.*?" + pattern, self.output)
        return {int(iteration): float(value) for iteration, value in found}

    @property
    def error(self) -> str:
        """The line that says why the start failed."""
        lines = [line for line in self.output.splitlines() if " error: " in line]
        return lines[0].split(" error: ", 1)[1] if lines else ""


def run_pretrain(
    flags: list[str],
    world_size: int = 1,
    timeout_s: float = TIMEOUT_S,
    script: str | None = None,
    environment: Mapping[str, str] | None = None,
    prepare: Callable[[int], None] | None = None,
    main: Callable[[], None] | None = None,
) -> Run:
    """Run ``pretrain_gpt_scmoe.py`` with ``flags`` on ``world_size`` ranks.

    Args:
        script: run this one instead, by ``megatron_scmoe.run``.
        environment: see :func:`run_distributed`.
        prepare: is called with the rank in each process before the script; importable by name.
        main: is called in place of the script; importable by name.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        task = (world_size, launch.free_port(), flags, str(log), script, environment, prepare, main)
        if not cpu_backend.is_enabled():
            try:
                statuses = gpu_ranks(environment).call(
                    _status_of_pretrain, world_size, timeout_s, *task, is_failure=bool
                )
            except RankFailure as failure:
                output = log.read_text() if log.exists() else ""
                raise RankFailure(f"{failure}\n{output[-4000:]}") from None
        else:
            processes = [
                _context.Process(target=_pretrain, args=(rank, *task)) for rank in range(world_size)
            ]
            statuses = _join(processes, timeout_s)
        status = next((s for s in statuses if s not in (0, None)), 0)
        if None in statuses:
            status = -1
        return Run(status, log.read_text() if log.exists() else "")


def _pretrain(rank: int, *task) -> None:
    os._exit(_status_of_pretrain(rank, *task))


def _status_of_pretrain(
    rank: int,
    world_size: int,
    port: int,
    flags: list[str],
    log: str,
    script=None,
    environment=None,
    prepare=None,
    main=None,
) -> int:
    """Run the script in this process, its output appended to ``log``; the status it ends with."""
    with _output_to(log):
        _set_rank(rank, world_size)
        os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        os.environ |= environment or {}
        sys.argv = ["pretrain_gpt_scmoe.py", *flags]
        set_start_method("fork", force=True)  # what a rank started by a launcher has
        from megatron_scmoe.platform import command_line
        from megatron_scmoe.training import pretrain

        main = main or pretrain.main
        if script is not None:
            from megatron_scmoe.run import main

            sys.argv = ["megatron_scmoe.run", script, *flags]

        if prepare is not None:
            prepare(rank)
        command_line.LAST_WORD_S = 0.5
        try:
            command_line.run_command(main)
        except SystemExit as stop:
            return stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
            return 1
        return 0


@contextlib.contextmanager
def _output_to(log: str):
    """What this process prints, also from C++, goes to the end of the file ``log``."""
    streams, files = (sys.stdout, sys.stderr), (os.dup(1), os.dup(2))
    with open(log, "a", buffering=1) as stream:
        for number in (1, 2):
            os.dup2(stream.fileno(), number)
        sys.stdout = sys.stderr = stream
        try:
            yield
        finally:
            stream.flush()
            sys.stdout, sys.stderr = streams
            for number, file in zip((1, 2), files):
                os.dup2(file, number)
                os.close(file)


def _set_rank(rank: int, world_size: int) -> None:
    import torch

    torch.set_num_threads(1)
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": str(world_size)}


def _in_process_group(rank, folder, backend, world_size, environment, function, args, kwargs):
    import torch

    _set_rank(rank, world_size)
    os.environ |= environment or {}
    if backend == "nccl":
        torch.cuda.set_device(rank)
    torch.distributed.init_process_group(
        backend, init_method=f"file://{folder}/store", rank=rank, world_size=world_size
    )
    try:
        return function(*args, **kwargs)
    finally:
        with contextlib.suppress(Exception):
            destroy_process_groups()


def _send_result(rank, results, *task):
    try:
        results.put((rank, _in_process_group(rank, *task), None))
    except BaseException:
        results.put((rank, None, traceback.format_exc()))


def _run(world_size: int, target, args) -> list:
    results = _context.SimpleQueue()
    processes = [
        _context.Process(target=target, args=(rank, results, *args)) for rank in range(world_size)
    ]
    returned = {}
    failures = []

    def drain():
        while not results.empty():
            rank, value, failure = results.get()
            returned[rank] = value
            if failure is not None:
                failures.append(f"rank {rank}:\n{failure}")

    statuses = _join(processes, TIMEOUT_S, drain, lambda: bool(failures))
    drain()
    if failures:
        raise RankFailure("\n".join(failures))
    if len(returned) != world_size:
        raise RankFailure(f"only ranks {sorted(returned)} finished; exit statuses {statuses}")
    return [returned[rank] for rank in range(world_size)]


def _join(processes, timeout_s: float, poll=lambda: None, stop=lambda: False) -> list[int | None]:
    """Start and join; when one fails the others get a moment, then are ended, as a launcher does."""
    import time

    for process in processes:
        process.start()
    deadline = time.monotonic() + timeout_s
    while any(process.is_alive() for process in processes):
        poll()
        failed = stop() or any(p.exitcode not in (0, None) for p in processes)
        if failed:
            deadline = min(deadline, time.monotonic() + PATIENCE_S)
        if time.monotonic() > deadline:
            break
        time.sleep(0.02)
    poll()
    statuses = [process.exitcode for process in processes]
    for process in processes:
        if process.is_alive():
            process.kill()
        process.join()
    return statuses
