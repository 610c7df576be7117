"""Gate and encode inside a CUDA graph: what the graph holds of the routed path, in one object.

The dense block's graph computes them (model/transformer_layer.py). A replay runs no Python, so what
later steps read of the routing comes out of the graph as tensors and is put back where they look.
"""

import torch
from torch import Tensor

from megatron_scmoe.overlap.async_all_to_all import CompletedExchange, Flight, event_in_graph
from megatron_scmoe.overlap.schedule import Step

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
