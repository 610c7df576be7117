"""Between the endpoints and the engine: what is asked for, what is new, who has gone away."""

import asyncio
import time
from collections.abc import AsyncGenerator, Sequence
from dataclasses import dataclass

from starlette.requests import ClientDisconnect, Request

from megatron_scmoe.inference.engine import CLOSING, Engine, Job, Progress
from megatron_scmoe.serving.metrics import Metrics
from megatron_scmoe.serving.protocol import ApiError


class Writer:
    """Has texts written for the clients that wait for them. All of it is on the endpoints' thread.

    Args:
        max_queue: texts that may wait for a slot; more are refused.
    """

    def __init__(self, engine: Engine, metrics: Metrics, max_queue: int):
        self._engine, self._metrics, self._max_queue = engine, metrics, max_queue
        self._unfinished = 0

    async def write(
        self, request: Request, jobs: Sequence[Job]
    ) -> AsyncGenerator[tuple[int, Progress], None]:
        """What is new of which job, until all are at their end.

        Raises:
            ApiError: if there is no room, or the engine fails.
            ClientDisconnect: if nobody waits for the answer any more.
        """
        if self._engine.is_closing:
            raise ApiError(503, CLOSING)
        room = self._engine.size + self._max_queue
        if len(jobs) > room:
            raise ApiError(400, f"{len(jobs)} texts: this server takes {room} at most.")
        if self._unfinished + len(jobs) > room:
            self._metrics.texts.labels("refused").inc(len(jobs))
            raise ApiError(
                429,
                f"The queue is full: {self._unfinished} texts are written or wait, and {room} may. "
                "Try again later.",
                code="queue_full",
            )
        began = time.perf_counter()
        loop, inbox = asyncio.get_running_loop(), asyncio.Queue[tuple[int, Progress] | None]()
        gone = loop.create_task(_wait_until_gone(request, inbox))
        unfinished = {index: job for index, job in enumerate(jobs)}
        new = set(unfinished)
        self._unfinished += len(jobs)
        try:
            for index, job in enumerate(jobs):
                job.tell = _Teller(loop, inbox, index)
                self._metrics.prompt_tokens.inc(len(job.text.prompt))
                self._engine.submit(job)
            while unfinished:
                event = await inbox.get()
                if event is None:
                    raise ClientDisconnect
                index, progress = event
                now = time.perf_counter() - began
                if progress.is_last:
                    del unfinished[index]
                    self._unfinished -= 1
                    self._metrics.texts.labels(progress.finish_reason or "failed").inc()
                    self._metrics.whole_text.observe(now)
                if progress.error:
                    raise ApiError(503 if progress.error == CLOSING else 500, progress.error)
                if index in new:
                    new.discard(index)
                    self._metrics.first_token.observe(now)
                self._metrics.tokens.inc(len(progress.places))
                yield index, progress
        finally:
            gone.cancel()
            self._unfinished -= len(unfinished)
            for job in unfinished.values():
                self._metrics.texts.labels("cancelled").inc()
                self._engine.cancel(job.text.key)


@dataclass(frozen=True)
class _Teller:
    """Brings what the engine tells to the thread of the endpoints."""

    loop: asyncio.AbstractEventLoop
    inbox: asyncio.Queue
    index: int

    def __call__(self, progress: Progress) -> None:
        self.loop.call_soon_threadsafe(self.inbox.put_nowait, (self.index, progress))


async def _wait_until_gone(request: Request, inbox: asyncio.Queue) -> None:
    while (await request.receive())["type"] != "http.disconnect":
        pass
    inbox.put_nowait(None)
