"""Texts are queued, written in a batch that they join and leave at any token, and told of as they grow.

The first rank decides (:class:`Engine`): who joins, who leaves, what ends a text. Before each step it
tells the others, which do the same (:func:`follow`).
"""

import queue
import time
import traceback
from collections import deque
from collections.abc import Callable
from dataclasses import dataclass, field

import torch

from megatron_scmoe.inference.generation import LENGTH, STOP
from megatron_scmoe.inference.offloading import ExpertOffload
from megatron_scmoe.inference.slots import Place, Slots, Text, Written
from megatron_scmoe.inference.text import Continuation
from megatron_scmoe.platform.first_rank import ask_first_rank

BEAT_S = 30
"""How long the other ranks hear nothing while there is nothing to do; collectives have a time limit."""

SUM_UP_S = 1.0
"""How old what is known of the experts' caches may be while texts are being written."""

BROKEN = "The model failed; the server's log has the reason."
CLOSING = "The server is shutting down."


@dataclass(frozen=True)
class Progress:
    """What is new of a text."""

    text: str = ""
    places: tuple[Place, ...] = ()
    """Tokens, the stop word's included; text that may become one, or half a character, waits."""
    start: int = 0
    """Characters of the text before these tokens."""
    prompt: tuple[Place, ...] = ()
    """Places of the prompt from the second on, if asked for; once."""
    finish_reason: str | None = None
    """LENGTH or STOP, with the last part."""
    error: str | None = None
    """BROKEN or CLOSING, if the text ends because of it."""

    @property
    def is_last(self) -> bool:
        return bool(self.finish_reason or self.error)


@dataclass(eq=False)
class Job:
    """A text that is to be written, what ends it, and who is told."""

    text: Text
    max_tokens: int
    """0 to have the prompt read alone."""
    words: Continuation
    termination_id: int | None
    """The token that ends the text, and is no part of it."""
    tell: Callable[[Progress], None]
    """Called on the engine's thread, with each token; it must not wait."""
    tokens: list[int] = field(default_factory=list)


class Engine:
    """The first rank's loop. ``run`` keeps one thread; everything else may be called on any.

    Args:
        experts: what has the model's experts, if they are offloaded; summed up every :data:`SUM_UP_S`
            seconds, and when a text ends.
    """

    def __init__(self, slots: Slots, experts: ExpertOffload | None = None):
        self._slots = slots
        self.experts = experts
        self._inbox: queue.SimpleQueue = queue.SimpleQueue()  # a signal's handler may put into it
        self._waiting: deque[Job] = deque()
        self._running: dict[int, Job] = {}
        self._leaving: set[int] = set()
        self._ends_at: float | None = None
        self._summed_up_at = 0.0

    @property
    def size(self) -> int:
        """Texts that are written at once, at most."""
        return self._slots.size

    @property
    def running(self) -> int:
        """Texts that are being written."""
        return len(self._running)

    @property
    def waiting(self) -> int:
        """Texts that wait until one of these ends."""
        return len(self._waiting)

    @property
    def is_closing(self) -> bool:
        return self._ends_at is not None

    def submit(self, job: Job) -> None:
        """Have a text written, after those that wait already."""
        self._inbox.put(("submit", job))

    def cancel(self, key: int) -> None:
        """Stop writing a text, if it is not at its end; nobody is told of it any more."""
        self._inbox.put(("cancel", key))

    def close(self, grace_s: float) -> None:
        """Fail what waits, write what runs to its end, for so many seconds at most, and end ``run``."""
        self._inbox.put(("close", time.monotonic() + grace_s))

    def run(self) -> None:
        """Write texts until ``close`` is called.

        An error of the model fails the texts that are being written. On one rank the loop goes on; on
        several it ends with the error, as the ranks may not be in step any more.
        """
        while True:
            self._receive()
            if self._ends_at is not None:
                self._wind_up(self._ends_at)
            is_done = self.is_closing and not self._running
            joining = [] if is_done else self._admit()
            leaving, self._leaving = self._leaving, set()
            sums_up = self._sums_up()
            _tell_ranks((is_done, leaving, [job.text for job in joining], sums_up))
            if is_done:
                return
            try:
                experts = self.experts if sums_up else None
                written = _step(self._slots, experts, leaving, [job.text for job in joining])
            except Exception:
                self._fail(self._running.values(), BROKEN)
                self._running.clear()
                if torch.distributed.get_world_size() > 1:
                    raise
                self._slots.clear()
                traceback.print_exc()
                continue
            for item in written:
                self._deliver(item)

    def _sums_up(self) -> bool:
        """Whether this step sums up: it may be the last one of a text, or the last sum is old."""
        ends = any(job.max_tokens <= len(job.tokens) + 1 for job in self._running.values())
        now = time.monotonic()
        if self._running and not ends and now < self._summed_up_at + SUM_UP_S:
            return False
        self._summed_up_at = now
        return True

    def _receive(self) -> None:
        """Take what was asked for since; wait for it if there is nothing else to do."""
        is_idle = not (self._running or self._waiting or self._leaving or self.is_closing)
        try:
            while True:
                what, value = self._inbox.get(block=is_idle, timeout=BEAT_S)
                is_idle = False
                if what == "submit":
                    self._waiting.append(value)
                elif what == "close":
                    self._ends_at = min(value, self._ends_at or value)
                elif self._running.pop(value, None):
                    self._leaving.add(value)
                else:
                    self._waiting = deque(j for j in self._waiting if j.text.key != value)
        except queue.Empty:
            pass

    def _admit(self) -> list[Job]:
        """Those that may join now."""
        waiting = [(len(job.text.prompt), job.max_tokens) for job in self._waiting]
        count = self._slots.count_fitting(waiting, self._leaving)
        joining = [self._waiting.popleft() for _ in range(count)]
        self._running |= {job.text.key: job for job in joining}
        return joining

    def _deliver(self, written: Written) -> None:
        """Tell of a token; a text that it ends leaves with the next step."""
        job = self._running[written.key]
        place, start = written.place, len(job.words.text(job.tokens))
        if job.max_tokens == 0:
            progress = Progress(prompt=tuple(written.prompt), finish_reason=LENGTH)
        elif place.token == job.termination_id:
            text = job.words.new_text(job.tokens, is_last=True)
            progress = Progress(text, (), start, tuple(written.prompt), STOP)
        else:
            job.tokens.append(place.token)
            reason = None
            if job.words.stops(job.tokens):
                reason = STOP
            elif len(job.tokens) == job.max_tokens:
                reason = LENGTH
            text = job.words.new_text(job.tokens, is_last=reason is not None)
            progress = Progress(text, (place,), start, tuple(written.prompt), reason)
        if progress.is_last:
            del self._running[written.key]
            self._leaving.add(written.key)
        job.tell(progress)

    def _wind_up(self, ends_at: float) -> None:
        """Fail what waits, and what runs once its time is over."""
        self._fail(self._waiting, CLOSING)
        self._waiting.clear()
        if time.monotonic() >= ends_at:
            self._fail(self._running.values(), CLOSING)
            self._running.clear()

    @staticmethod
    def _fail(jobs, error: str) -> None:
        for job in jobs:
            job.tell(Progress(error=error))


def follow(slots: Slots, experts: ExpertOffload | None = None) -> None:
    """What every other rank does while the first one runs an :class:`Engine`."""
    while True:
        is_done, leaving, joining, sums_up = _tell_ranks(None)
        if is_done:
            return
        _step(slots, experts if sums_up else None, leaving, joining)


def _step(slots: Slots, experts: ExpertOffload | None, leaving, joining) -> list[Written]:
    """What all ranks do at once."""
    written = slots.step(leaving, joining)
    if experts is not None:
        experts.sum_up()
    return written


def _tell_ranks(command):
    """The first rank's command, on every rank."""
    return ask_first_rank(lambda: command)
