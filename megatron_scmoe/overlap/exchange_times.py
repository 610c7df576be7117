"""When exchanges begin, arrive and are needed: what async_all_to_all.py tells a recorder of them.

    recorder = ExchangeRecorder()
    record_with(recorder)              # async_all_to_all.py
    ...                                # forward and backward
    record_with(None)
    times = recorder.read()            # the host waits for the GPU once, here

On the GPU the times are those of events, recorded on the streams where the exchange is launched and
where compute waits for it.
"""

import time
from dataclasses import dataclass

import torch


@dataclass(frozen=True)
class ExchangeTimes:
    """When one exchange, one way, was where, in ms since the recorder was made."""

    is_backward: bool
    begun: float
    """It could begin: its tensors were ready, it was launched, and the exchange before it was done."""
    done: float | None
    """All had arrived; None if that could not be asked for."""
    reached: float
    """The compute needed what arrives."""
    resumed: float
    """The compute had it. What lies between these two is a stall."""
    lead: float
    """How far the host was ahead of the GPU when it issued that wait."""


class Moments:
    """The events of one exchange, one way."""

    def __init__(self, is_backward: bool):
        self.is_backward = is_backward
        self.begun = _event()
        self.done: torch.cuda.Event | None = None
        self.reached, self.resumed = _event(), _event()
        self.host_reached = 0.0
        self.is_over = False

    def expect_arrival(self) -> torch.cuda.Event:
        """What is to be recorded when all has arrived."""
        self.done = _event()
        return self.done

    def reach(self) -> None:
        """The compute waits, on the current stream."""
        self.reached.record()
        self.host_reached = time.perf_counter()

    def resume(self) -> None:
        """The wait is over, on the current stream."""
        self.resumed.record()
        self.is_over = True


class ExchangeRecorder:
    """Takes the times of exchanges, from now on."""

    def __init__(self) -> None:
        self._start = _event()
        self._start.record()
        self._moments: list[Moments] = []

    def begins(self, is_backward: bool) -> Moments:
        """An exchange is about to be launched, on the current stream."""
        moments = Moments(is_backward)
        moments.begun.record()
        self._moments.append(moments)
        return moments

    def read(self) -> list[ExchangeTimes]:
        """The times of all exchanges that were waited for, in the order of launches.

        The host waits until the GPU has come this far. So it learns what the GPU's clock says now, and
        how far it was ahead of it before.
        """
        end = _event()
        end.record()
        end.synchronize()
        host_end = time.perf_counter()
        for moments in self._moments:
            if moments.done is not None:
                moments.done.synchronize()  # on another stream, microseconds behind the compute's wait
        whole = self._since_start(end)
        return [
            ExchangeTimes(
                is_backward=moments.is_backward,
                begun=self._since_start(moments.begun),
                done=None if moments.done is None else self._since_start(moments.done),
                reached=self._since_start(moments.reached),
                resumed=self._since_start(moments.resumed),
                lead=(host_end - moments.host_reached) * 1e3
                - (whole - self._since_start(moments.reached)),
            )
            for moments in self._moments
            if moments.is_over
        ]

    def _since_start(self, event: torch.cuda.Event) -> float:
        return float(self._start.elapsed_time(event))


def _event() -> torch.cuda.Event:
    return torch.cuda.Event(enable_timing=True)
