"""Which rank the others wait for, when one hangs or its host is lost.

A collective that times out says that it waited, not for whom. So a thread of every rank writes a beat
into the launcher's store, with what the main thread does. Where a collective fails, the rank reads the
beats of all. Nothing is compared with a clock of another host.
"""

import contextlib
import json
import linecache
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from typing import Any

import torch

from megatron_scmoe.errors import ScMoEError
from megatron_scmoe.platform import rank_store
from megatron_scmoe.platform.command_line import was_left_by_another_rank

BEAT_S = 3
"""Between two beats of a rank; with more than 300 ranks longer, so that the store has 100 a second."""

ANSWER_S = 10
"""How long the store may take."""


class LostRankError(ScMoEError):
    """A rank has hung, or cannot be reached; the message names it."""

    status = 1


class Heartbeats:
    """The beats of this rank, and what those of the others say."""

    def __init__(self) -> None:
        self._stop = threading.Event()
        self._thread: threading.Thread | None = None
        self._iteration = 0
        self._is_failing = False

    def iteration_begins(self, done: int) -> None:
        """Hear of each iteration; the first starts the thread."""
        self._iteration = done + 1
        if self._thread is None and torch.distributed.get_world_size() > 1:
            self._thread = threading.Thread(target=self._beat, name="heartbeat", daemon=True)
            self._thread.start()

    @contextlib.contextmanager
    def name_who_is_lost(self) -> Iterator[None]:
        """Around the loop.

        Raises:
            LostRankError: in place of the error of a collective, if the beats tell whom it waited for.
        """
        try:
            yield
        except Exception as error:
            if self._thread is None or not was_left_by_another_rank(error):
                raise
            told = self._ask()
            if told is None:
                raise
            raise LostRankError(f"{told}; --load goes on from the last checkpoint") from error
        finally:
            self._stop.set()

    def _beat(self) -> None:
        rank, ranks = torch.distributed.get_rank(), torch.distributed.get_world_size()
        count = 0
        with contextlib.suppress(RuntimeError):  # the store is gone, or cannot be reached
            store = rank_store.connect(ANSWER_S)
            while True:
                count += 1
                beat = {"count": count, "host": socket.gethostname(), "iteration": self._iteration}
                beat |= {"is_failing": self._is_failing, "place": _place_of_main_thread()}
                store.set(f"beat/{rank}", json.dumps(beat))
                if self._stop.wait(max(BEAT_S, ranks / 100)):
                    return

    def _ask(self) -> str | None:
        """What is known of a rank that the others wait for."""
        self._is_failing = True
        ranks = torch.distributed.get_world_size()
        try:
            store = rank_store.connect(ANSWER_S)
            before = _read(store, ranks)
            time.sleep(2.5 * max(BEAT_S, ranks / 100))
            now = _read(store, ranks)
        except RuntimeError:
            return (
                f"rank {torch.distributed.get_rank()} on {socket.gethostname()} does not reach "
                f"{os.environ['MASTER_ADDR']}: that host is lost, or the network between them"
            )
        return judge(before, now)


Beat = dict[str, Any]


def judge(before: list[Beat | None], now: list[Beat | None]) -> str | None:
    """Who is lost, by two readings of all ranks' beats; None if they do not tell.

    Args:
        before, now: by rank; None for a rank that has begun no iteration yet.
    """
    for rank, (old, new) in enumerate(zip(before, now, strict=True)):
        if old and new and old["count"] == new["count"]:
            return (
                f"rank {rank} on {new['host']} is silent, after iteration {new['iteration']} or later: "
                "it was ended or stopped, or its host or the network to it is lost"
            )
    busy = [
        (rank, beat)
        for rank, beat in enumerate(now)
        if beat and beat["place"] and not beat["is_failing"]
    ]
    if len(busy) == 1:
        ((rank, beat),) = busy
        return (
            f"rank {rank} on {beat['host']} hangs in iteration {beat['iteration']}, at "
            f"{beat['place']}: the others waited for it as long as --distributed-timeout-minutes"
        )
    # Several may be those of a later pipeline stage, which wait for the first one's output.
    missing = [rank for rank, beat in enumerate(now) if beat is None]
    if len(missing) == 1 and not busy:
        return (
            f"rank {missing[0]} has begun no iteration: it hangs before its first one, or was ended"
        )
    return None


def _read(store: rank_store.Store, ranks: int) -> list[Beat | None]:
    keys = [f"beat/{rank}" for rank in range(ranks)]
    return [json.loads(store.get(key)) if store.check([key]) else None for key in keys]


def _place_of_main_thread() -> str | None:
    """File, line and function where the main thread is; None if it waits for other ranks there."""
    frame = innermost = sys._current_frames().get(threading.main_thread().ident or 0)
    if frame is None or innermost is None:
        return None
    file = innermost.f_code.co_filename
    line = linecache.getline(file, innermost.f_lineno)
    is_of_python = "multiprocessing/" in file or file.endswith("threading.py")
    if not is_of_python and (".wait(" in line or ".synchronize(" in line):
        return None
    while frame is not None:
        if frame.f_code.co_filename.endswith(_COLLECTIVES):
            return None
        frame = frame.f_back
    code = innermost.f_code
    name = "/".join(code.co_filename.split(os.sep)[-2:])
    return f"{name}:{innermost.f_lineno} ({code.co_name})"


_COLLECTIVES = (
    "torch/distributed/distributed_c10d.py",
    "torch/distributed/_functional_collectives.py",
    "torch/distributed/nn/functional.py",
)
"""Files whose functions return when other ranks have come as far."""
