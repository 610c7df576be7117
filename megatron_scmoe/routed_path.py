"""The routed path of one pair of blocks: from the tap to the combined output.

The backbone's layers tell it of every boundary they pass; it takes the steps that the schedule lists
there. It is not a module: the parameters it uses belong to the MoE layer it is connected to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

from megatron.core.utils import nvtx_range_pop, nvtx_range_push
from torch import Tensor

from megatron_scmoe.exchange import Flight, Landed
from megatron_scmoe.router import ZeroExpertOutput
from megatron_scmoe.schedule import Boundary, Schedule, Step

_NO_BATCH = MappingProxyType({})


@dataclass
class _Pass:
    """What the routed path carries from step to step in one forward."""

    tap: Tensor
    batch: Mapping[str, Any]
    tokens: Tensor | None = None
    probs: Tensor | None = None
    routing_map: Tensor | None = None
    flight: Flight | Landed | None = None
    zero: ZeroExpertOutput | None = None
    output: Tensor | None = None


class RoutedPath:
    """Takes the routed steps of one MoE layer when the backbone passes the schedule's boundaries.

    Args:
        schedule: which steps to take at which boundary.
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        self.on_step: Callable[[Step], None] | None = None
        """Called before each step; tests and schedule plots record with it."""
        self._moe = None
        self._norm: Callable[[Tensor], Tensor] | None = None
        self._unflatten: Callable | None = None
        self._pass: _Pass | None = None
        self._steps = {
            Step.ROUTE: self._route,
            Step.PERMUTE: self._permute,
            Step.LAUNCH_DISPATCH: self._launch_dispatch,
            Step.WAIT_DISPATCH: self._wait_dispatch,
            Step.EXPERTS: self._experts,
            Step.LAUNCH_COMBINE: self._launch_combine,
            Step.WAIT_COMBINE: self._wait_combine,
            Step.UNPERMUTE: self._unpermute,
        }

    def connect(self, moe) -> None:
        """Attach the MoE layer whose router, experts and dispatcher this path uses.

        Raises:
            RuntimeError: if the path has one already: a spec builds one model.
        """
        if self._moe is not None:
            raise RuntimeError(
                "this ScMoE spec has built a model already; build a new spec for each model"
            )
        self._moe = moe

    def set_norm(self, norm: Callable[[Tensor], Tensor]) -> None:
        """Set the norm between tap and router: [s, b, h] -> [s, b, h]."""
        self._norm = norm

    def set_unflatten(self, unflatten: Callable) -> None:
        """Set how packed sequences regain their batch dimension (Megatron's, of the MoE block)."""
        self._unflatten = unflatten

    def passed(
        self, boundary: Boundary, tap: Tensor | None = None, batch: Mapping[str, Any] = _NO_BATCH
    ) -> None:
        """Hear that the backbone has reached ``boundary`` and take the steps due there.

        Args:
            boundary: what has been reached.
            tap: the backbone's tensor at this boundary, [s, b, h]; read if this is the tap.
            batch: the keyword arguments of the block's forward; read are ``padding_mask`` ([b, s],
                True for padding, which the router's losses leave out) and ``packed_seq_params``.
        """
        if boundary == self.schedule.tap:
            self._pass = _Pass(tap, batch)
        for step in self.schedule.at(boundary):
            if self.on_step is not None:
                self.on_step(step)
            nvtx_range_push(suffix=step.value)
            self._steps[step](self._pass)
            nvtx_range_pop(suffix=step.value)

    def collect(self) -> Tensor:
        """The routed output [s, b, h] of this forward; afterwards nothing of it is kept here."""
        state, self._pass = self._pass, None
        return state.output

    def _route(self, state: _Pass) -> None:
        state.tap, mask, _ = self._unflatten(
            self._norm(state.tap),
            state.batch.get("padding_mask"),
            state.batch.get("packed_seq_params"),
        )
        if mask is not None:
            mask = mask.transpose(0, 1).bool()  # the router wants [s, b]
        state.probs, state.routing_map, state.zero = self._moe.route(state.tap, mask)

    def _permute(self, state: _Pass) -> None:
        tokens, probs = self._moe.preprocess(state.tap, state.probs, state.routing_map)
        state.tap = state.probs = state.routing_map = None
        state.flight = self._moe.token_dispatcher.prepare_dispatch(tokens, probs)

    def _launch_dispatch(self, state: _Pass) -> None:
        self._moe.token_dispatcher.launch_dispatch(state.flight)

    def _wait_dispatch(self, state: _Pass) -> None:
        state.tokens, state.probs = state.flight.arrive()

    def _experts(self, state: _Pass) -> None:
        state.tokens, _ = self._moe.routed_experts_compute(state.tokens, state.probs)
        state.probs = None

    def _launch_combine(self, state: _Pass) -> None:
        state.flight = self._moe.token_dispatcher.launch_combine(state.tokens)
        state.tokens = None

    def _wait_combine(self, state: _Pass) -> None:
        (state.tokens,) = state.flight.arrive()
        state.flight = None

    def _unpermute(self, state: _Pass) -> None:
        state.output = self._moe.postprocess(state.tokens, None)
        if state.zero is not None:
            state.output = state.zero.add_to(state.output)
        state.tokens = None
