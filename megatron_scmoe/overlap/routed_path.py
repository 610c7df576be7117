"""The routed path of one pair of blocks: from the tap to the combined output.

The backbone's layers tell it of every boundary they pass; it takes the steps that the schedule lists
there. It is not a module: the parameters it uses belong to the MoE layer it is bound to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from types import MappingProxyType
from typing import Any, Protocol

import torch
from megatron.core.utils import nvtx_range_pop, nvtx_range_push
from torch import Tensor

from megatron_scmoe.overlap.async_all_to_all import CompletedExchange, Flight, now
from megatron_scmoe.overlap.cuda_graph import CAPTURED_STEPS, CapturedRouting
from megatron_scmoe.overlap.schedule import Action, Boundary, Schedule, Step

_NO_BATCH: Mapping[str, Any] = MappingProxyType({})


class AddedOutput(Protocol):
    """What the router adds to the routed output without an expert (router.ZeroExpertOutput)."""

    def add_to(self, routed: Tensor) -> Tensor:
        """``routed``, [s, b, h], with it added."""


@dataclass
class _Chunk:
    """What one chunk of the tokens carries from step to step."""

    tap: Tensor | None = None
    probs: Tensor | None = None
    routing_map: Tensor | None = None
    tokens: Tensor | None = None
    flight: Flight | CompletedExchange | None = None
    output: Tensor | None = None


@dataclass
class _Pass:
    """One forward."""

    batch: Mapping[str, Any]
    tap: Tensor | None = None
    chunks: list[_Chunk] = field(default_factory=list)
    zero: AddedOutput | None = None
    done: tuple[Step, ...] = ()


class RoutedPath:
    """Takes the routed steps of one MoE layer when the backbone passes the schedule's boundaries.

    Args:
        schedule: which steps to take at which boundary.
    """

    def __init__(self, schedule: Schedule):
        self.schedule = schedule
        """May be replaced between forwards; the number of chunks stays."""
        self.on_action: Callable[[Action], None] | None = None
        """Called before each action; tests and measurements record with it."""
        self.on_routing: Callable[[Tensor], None] | None = None
        """Called with the chosen experts of each forward, [tokens, experts], bool."""
        self.on_dispatch: Callable[[list[int]], None] | None = None
        """Called for each chunk when its dispatch was launched, with how many tokens each expert of
        this rank gets: the first moment when the host can know."""
        self._moe: Any = None  # a ScMoELayer: model/ imports this module, not the reverse
        self._unflatten: Any = None
        self._pass: _Pass | None = None
        self._captured: CapturedRouting | None = None
        self._steps = {
            Step.PERMUTE: self._permute,
            Step.LAUNCH_DISPATCH: self._launch_dispatch,
            Step.WAIT_DISPATCH: self._wait_dispatch,
            Step.EXPERTS: self._experts,
            Step.LAUNCH_COMBINE: self._launch_combine,
            Step.WAIT_COMBINE: self._wait_combine,
            Step.UNPERMUTE: self._unpermute,
        }

    def bind(self, moe, unflatten: Callable) -> None:
        """Attach the MoE block whose router, experts and dispatcher this path uses.

        Args:
            moe: the block's :class:`~megatron_scmoe.model.moe_layer.ScMoELayer`.
            unflatten: how packed sequences regain their batch dimension: Megatron's, of that block.

        Raises:
            RuntimeError: if the path has one already: a spec builds one model.
        """
        if self._moe is not None:
            raise RuntimeError(
                "this ScMoE spec has built a model already; build a new spec for each model"
            )
        self._moe, self._unflatten = moe, unflatten

    def begin(self, batch: Mapping[str, Any]) -> None:
        """A forward of the pair begins.

        Args:
            batch: the keyword arguments of the block's forward; read are ``padding_mask`` ([b, s],
                True for padding, which the router's losses leave out) and ``packed_seq_params``.
        """
        self._pass = _Pass(batch)

    def passed(self, boundary: Boundary, hidden_states: Tensor | None = None) -> None:
        """Hear that the backbone has reached ``boundary`` and take the steps due there.

        Args:
            boundary: what has been reached.
            hidden_states: the backbone's tensor at this boundary, [s, b, h]; read if this is the tap.
        """
        actions = self.schedule.at(boundary)
        if actions and boundary == self.schedule.tap:
            self._pass.tap = hidden_states
        for action in actions:
            if self.on_action is not None:
                self.on_action(action)
            if action.step in self._pass.done:
                continue
            nvtx_range_push(suffix=action.step.value)
            if action.step is Step.ROUTE:
                self._route(self._pass)
            else:
                self._moe.token_dispatcher = self._moe.token_dispatchers[action.chunk]
                self._steps[action.step](self._pass.chunks[action.chunk])
            nvtx_range_pop(suffix=action.step.value)

    def collect(self) -> Tensor:
        """The routed output [s, b, h] of this forward; afterwards nothing of it is kept here."""
        state, self._pass = self._pass, None
        outputs = [chunk.output for chunk in state.chunks]
        routed = outputs[0] if len(outputs) == 1 else torch.cat(outputs)
        return routed if state.zero is None else state.zero.add_to(routed)

    def routing_modules(self) -> list[torch.nn.Module]:
        """The modules that :meth:`capture` runs: the router, and the norm on the tap."""
        return [self._moe.shortcut_layernorm, self._moe.router]

    def capture(self, tap: Tensor) -> list[Tensor]:
        """Gate and encode while a CUDA graph is captured.

        Args:
            tap: [s, b, h].

        Returns:
            Permuted tokens, their probabilities, and what the dispatcher needs of the routing.
        """
        if self._captured is None:
            self._captured = CapturedRouting(self._moe)
        tap, _ = self.prepare(tap, _NO_BATCH)
        return self._captured.capture(tap)

    def resume(self, shape: torch.Size, captured: list[Tensor]) -> None:
        """Go on from a replay of what :meth:`capture` captured: in this forward it is done.

        Args:
            shape: of the tap, [s, b, h].
            captured: what the graph gave for what :meth:`capture` returned.

        Raises:
            ValueError: if the batch has a padding mask, which the graph has not.
        """
        if self._pass.batch.get("padding_mask") is not None:
            raise ValueError(
                "--cuda-graph-modules moe_router with a padding mask: the captured router reads none; "
                "accepted: attn"
            )
        ready = None if self.schedule.overlap else now()
        self._pass.chunks = [_Chunk(flight=self._captured.resume(shape, captured, ready))]
        if self.on_routing is not None:
            self.on_routing(self._moe.token_dispatcher.routing_map)
        self._pass.done = CAPTURED_STEPS

    def prepare(self, tap: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The router's input, norm(tap), [s, b, h], and its padding mask, [s, b], if any."""
        tap, mask, _ = self._unflatten(
            self._moe.norm_tap(tap), batch.get("padding_mask"), batch.get("packed_seq_params")
        )
        return tap, None if mask is None else mask.transpose(0, 1).bool()

    def _route(self, state: _Pass) -> None:
        tap, mask = self.prepare(state.tap, state.batch)
        state.tap = None
        probs, routing_map, state.zero = self._moe.route(tap, mask)
        if self.on_routing is not None:
            self.on_routing(routing_map)
        if self.schedule.chunks == 1:  # the backward of a split would copy the gradients
            state.chunks = [_Chunk(tap, probs, routing_map)]
            return
        taps = tap.tensor_split(self.schedule.chunks)
        tokens = [part.shape[0] * part.shape[1] for part in taps]
        state.chunks = [
            _Chunk(*parts)
            for parts in zip(taps, probs.split(tokens), routing_map.split(tokens), strict=True)
        ]

    def _permute(self, chunk: _Chunk) -> None:
        tokens, probs = self._moe.preprocess(chunk.tap, chunk.probs, chunk.routing_map)
        chunk.tap = chunk.probs = chunk.routing_map = None
        chunk.flight = self._moe.token_dispatcher.prepare_dispatch(tokens, probs)

    def _launch_dispatch(self, chunk: _Chunk) -> None:
        self._moe.token_dispatcher.launch_dispatch(chunk.flight)
        if self.on_dispatch is not None:
            self.on_dispatch(self._moe.token_dispatcher.local_counts())

    def _wait_dispatch(self, chunk: _Chunk) -> None:
        chunk.tokens, chunk.probs = chunk.flight.arrive()

    def _experts(self, chunk: _Chunk) -> None:
        chunk.tokens, _ = self._moe.routed_experts_compute(chunk.tokens, chunk.probs)
        chunk.probs = None

    def _launch_combine(self, chunk: _Chunk) -> None:
        chunk.flight = self._moe.token_dispatcher.launch_combine(chunk.tokens)
        chunk.tokens = None

    def _wait_combine(self, chunk: _Chunk) -> None:
        (chunk.tokens,) = chunk.flight.arrive()
        chunk.flight = None

    def _unpermute(self, chunk: _Chunk) -> None:
        chunk.output = self._moe.postprocess(chunk.tokens, None)
        chunk.tokens = None
