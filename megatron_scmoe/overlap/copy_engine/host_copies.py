"""Copies from the host's memory to the device's, beside the compute, in the order of their start."""

from concurrent.futures import Future, ThreadPoolExecutor

import torch
from torch import Tensor

from megatron_scmoe.platform import cpu_backend


class HostCopies:
    """One copy after the other: on a GPU on a stream of its own, on the CPU in a thread.

    Nothing here is differentiable.
    """

    def __init__(self):
        self._stream: torch.cuda.Stream | None = None
        self._thread: ThreadPoolExecutor | None = None
        if cpu_backend.is_enabled():
            self._thread = ThreadPoolExecutor(1, "host-copies")
        else:
            self._stream = torch.cuda.Stream()
        self._waits: list[tuple[torch.cuda.Event, torch.cuda.Event]] = []
        self._waited_ms = 0.0

    def start(
        self, target: Tensor, source: Tensor, after: torch.cuda.Event | None
    ) -> "torch.cuda.Event | Future":
        """Copy ``source``, on the host and on a GPU's host pinned, to ``target`` of the same shape.

        Args:
            after: what must have happened before ``target`` is written to; None for nothing. On the
                CPU it has: compute is done when its call returns.

        Returns:
            What :meth:`wait` takes. Until then ``target`` and ``source`` stay as they are.
        """
        if self._thread is not None:
            return self._thread.submit(target.copy_, source)
        assert self._stream is not None
        if after is not None:
            self._stream.wait_event(after)
        with torch.cuda.stream(self._stream):
            target.copy_(source, non_blocking=True)
            return self._stream.record_event()

    def wait(self, copy: "torch.cuda.Event | Future") -> None:
        """Compute issued from now on finds the copy done."""
        before, after = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        before.record()
        if isinstance(copy, Future):
            copy.result()
        else:
            torch.cuda.current_stream().wait_event(copy)
        after.record()
        self._waits.append((before, after))
        if len(self._waits) > _KEPT:
            self._add_up(len(self._waits) // 2)

    def waited_ms(self) -> float:
        """How long compute has stood still in :meth:`wait`, all in all; the host waits for it."""
        torch.cuda.synchronize()
        self._add_up(len(self._waits))
        return self._waited_ms

    def _add_up(self, count: int) -> None:
        """Turn the first ``count`` pairs of events into their sum."""
        for before, after in self._waits[:count]:
            after.synchronize()
            self._waited_ms += before.elapsed_time(after)
        del self._waits[:count]


_KEPT = 4096
"""Pairs of events; the older half of them happened long ago."""
