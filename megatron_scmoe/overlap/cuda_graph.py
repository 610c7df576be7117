"""CUDA graphs: of a whole function, in parts if need be, and gate and encode in the graph of a block of
training.

The latter are in the dense block's graph (model/transformer_layer.py). A replay runs no Python, so what
later steps read of the routing comes out of the graph as tensors and is put back where they look.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from megatron_scmoe.overlap.async_all_to_all import (
    CompletedExchange,
    Flight,
    beside_compute,
    event_in_graph,
)
from megatron_scmoe.overlap.schedule import Step
from megatron_scmoe.platform import cpu_backend

WARM_UPS = 2
"""Calls before a capture, in which libraries allocate their memory."""


def can_capture() -> bool:
    """Whether there is a GPU."""
    return not cpu_backend.is_enabled()


def new_pool():
    """Memory that graphs may share: one replays after the other, and its output is read before.

    It is there as long as one of them is: graphs that end together have one of their own.
    """
    return torch.cuda.graph_pool_handle() if can_capture() else None


def capture(run: Callable[[], Tensor], pool) -> Callable[[], Tensor]:
    """Capture what ``run`` enqueues, on other streams too.

    Args:
        run: reads and writes tensors that stay where they are. Nothing in it may wait for the device
            but what it leaves to :func:`between_graphs`.
        pool: as of :func:`new_pool`.

    Returns:
        What does the same again, and returns the tensor that ``run`` returned, filled anew.
    """
    global _under_way
    with beside_compute():
        for _ in range(WARM_UPS):
            run()
    _under_way = _Capture(pool)
    try:
        with beside_compute(), _under_way as under_way:
            output = run()
    finally:
        _under_way = None

    def replay() -> Tensor:
        for step in under_way.steps:
            step()
        return output

    return replay


def between_graphs(act: Callable[[], object]) -> None:
    """What no graph can have, for the host has to look at a result: done now, and in each replay.

    While a capture is under way it is not done. The graph ends here, and another one begins behind it.

    Args:
        act: reads tensors of the graph before, and fills those that the graph behind reads.
    """
    if _under_way is None:
        act()
    else:
        _under_way.interrupt(act)


def is_capturing() -> bool:
    """Whether :func:`capture` is recording, and nothing is computed."""
    return _under_way is not None


class _Capture:
    """Graphs that replay one after the other, and what is done between them.

    Not ``torch.cuda.graph``, which empties PyTorch's cache of memory at the begin of each.
    """

    def __init__(self, pool):
        self.steps: list[Callable[[], object]] = []
        self._pool = pool

    def __enter__(self) -> "_Capture":
        self._graph = torch.cuda.CUDAGraph()
        self._graph.capture_begin(self._pool, capture_error_mode="thread_local")
        self.steps.append(self._graph.replay)
        return self

    def __exit__(self, *error) -> None:
        self._graph.capture_end()

    def interrupt(self, act: Callable[[], object]) -> None:
        """See :func:`between_graphs`."""
        self.__exit__(None, None, None)
        self.steps.append(act)
        self.__enter__()


_under_way: _Capture | None = None


CAPTURED_STEPS = (Step.ROUTE, Step.PERMUTE)
"""The steps of the routed path that a graph takes."""


class CapturedRouting:
    """The captured steps of one MoE layer.

    Args:
        moe: the layer, a :class:`~megatron_scmoe.model.moe_layer.ScMoELayer`.
    """

    def __init__(self, moe):
        self._moe = moe
        self._ready = event_in_graph()
        """Happens in each replay when these steps are through, in the midst of the graph."""
        self._names: tuple[str, ...] = ()
        """Names of the dispatcher's tensors that the graph gives beside tokens and probabilities."""

    def capture(self, tap: Tensor) -> list[Tensor]:
        """Take the steps while the graph is captured.

        Args:
            tap: the router's input, [s, b, h].

        Returns:
            Permuted tokens, their probabilities, and the dispatcher's state.
        """
        probs, routing_map, _ = self._moe.route(tap)
        tokens, probs, state = self._moe.token_dispatcher.capture_permutation(
            tap, probs, routing_map
        )
        self._names = tuple(state)
        self._ready.record()
        return [tokens, probs, *state.values()]

    def resume(
        self, shape: torch.Size, captured: list[Tensor], ready: torch.cuda.Event | None
    ) -> Flight | CompletedExchange:
        """The tokens after a replay, ready to leave.

        Args:
            shape: of the tap, [s, b, h].
            captured: what the graph gave for what :meth:`capture` returned.
            ready: when they may leave; None for as soon as these steps are through.
        """
        tokens, probs, *values = captured
        return self._moe.token_dispatcher.resume_permutation(
            tokens,
            probs,
            dict(zip(self._names, values, strict=True)),
            shape,
            ready or self._ready,
        )
