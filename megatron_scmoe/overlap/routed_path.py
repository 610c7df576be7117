"""The routed path of one pair of blocks: from the tap to the combined output.

The backbone's layers tell it of every boundary they pass; it takes the steps that the schedule lists
there. It is not a module: the parameters it uses belong to the MoE layer it is connected to.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any, Protocol

import torch
from megatron.core.utils import nvtx_range_pop, nvtx_range_push
from torch import Tensor

from megatron_scmoe.overlap.async_all_to_all import CompletedExchange, Flight, event_in_graph
from megatron_scmoe.overlap.schedule import Action, Boundary, Schedule, Step

_NO_BATCH = MappingProxyType({})


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

    tap: Tensor
    batch: Mapping[str, Any]
    chunks: list[_Chunk]
    zero: AddedOutput | None = None
    done: tuple[Step, ...] = ()


_CAPTURED = (Step.ROUTE, Step.PERMUTE)


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
        self._moe = None
        self._norm: Callable[[Tensor], Tensor] | None = None
        self._unflatten: Callable | None = None
        self._pass: _Pass | None = None
        self._resumed: _Chunk | None = None
        self._captured: torch.cuda.Event | None = None
        self._steps = {
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
            self._pass = _Pass(tap, batch, [])
            if self._resumed is not None:
                self._pass = _Pass(tap, batch, [self._resumed], done=_CAPTURED)
                self._resumed = None
        for action in self.schedule.at(boundary):
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
        tap, _ = self.prepare(tap, _NO_BATCH)
        probs, routing_map, _ = self._moe.route(tap)
        captured = self._moe.token_dispatcher.capture_permutation(tap, probs, routing_map)
        self._captured = self._captured or event_in_graph()
        self._captured.record()
        return captured

    def resume(self, shape: torch.Size, captured: list[Tensor], batch: Mapping[str, Any]) -> None:
        """Continue after a replay of what :meth:`capture` captured: these steps are taken.

        Args:
            shape: of the tap, [s, b, h].
            captured: what the graph gave for what :meth:`capture` returned.
            batch: see :meth:`passed`.

        Raises:
            ValueError: if the batch has a padding mask, which the graph has not.
        """
        if batch.get("padding_mask") is not None:
            raise ValueError(
                "--cuda-graph-modules moe_router with a padding mask: the captured router reads none; "
                "accepted: attn"
            )
        ready = (
            self._captured if self.schedule.overlap else torch.cuda.current_stream().record_event()
        )
        flight = self._moe.token_dispatcher.resume_permutation(captured, shape, ready)
        self._resumed = _Chunk(flight=flight)

    def prepare(self, tap: Tensor, batch: Mapping[str, Any]) -> tuple[Tensor, Tensor | None]:
        """The router's input, norm(tap), [s, b, h], and its padding mask, [s, b], if any."""
        tap, mask, _ = self._unflatten(
            self._norm(tap), batch.get("padding_mask"), batch.get("packed_seq_params")
        )
        return tap, None if mask is None else mask.transpose(0, 1).bool()

    def _route(self, state: _Pass) -> None:
        tap, mask = self.prepare(state.tap, state.batch)
        state.tap = None
        probs, routing_map, state.zero = self._moe.route(tap, mask)
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
