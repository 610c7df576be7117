"""The experts of a layer that are on the host: what a model has in the place of Megatron's.

They compute one after the other with Megatron's own module, built for one expert, whose weights are
those that have arrived. Kernels and the order of sums are those of a resident model.
"""

import re
import sys
from collections.abc import Callable, Mapping, Sequence
from itertools import accumulate

import torch
from megatron.core.transformer.module import MegatronModule
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.errors import InputError, in_words
from megatron_scmoe.inference.expert_cache import ExpertCache
from megatron_scmoe.inference.expert_store import Packing
from megatron_scmoe.overlap.async_all_to_all import now
from megatron_scmoe.overlap.cuda_graph import between_graphs, capture, is_capturing, new_pool
from megatron_scmoe.platform import cpu_backend

FLAG = "--offload-experts"

Compute = Callable[[Sequence[Tensor], Tensor, Tensor], Tensor]
"""Gives the output of one expert, [tokens, h], from its weights, tokens [tokens, h] and probabilities
[tokens]."""


class OffloadedExperts(MegatronModule):
    """The experts of a layer, of which the device holds those that it needs.

    Args:
        build: Megatron's builder of experts.
        num_local_experts: of this rank.
        config: Megatron's settings of the model.
        kwargs: what else the builder takes.
    """

    layer: int
    cache: ExpertCache
    dispatcher: MoEAlltoAllTokenDispatcher
    graphs: "ExpertGraphs"

    def __init__(self, build, num_local_experts: int, config: TransformerConfig, *args, **kwargs):
        super().__init__(config)
        self.num_local_experts = num_local_experts
        self.expert = build(1, config, *args, **kwargs)
        (self._parameters_of_one,) = named_weights(self.expert)
        self.packing = Packing(
            {name: tuple(p.shape) for name, p in self._parameters_of_one.items()},
            config.params_dtype,
        )
        for parameter in self._parameters_of_one.values():
            parameter.requires_grad_(False)
        self._drop_weights()
        self._chosen = Chosen(num_local_experts)

    def attach(
        self,
        cache: ExpertCache,
        layer: int,
        dispatcher: MoEAlltoAllTokenDispatcher,
        graphs: "ExpertGraphs",
        at_the_gate: bool = True,
    ) -> None:
        """Say where the weights are, and the tokens come from.

        Args:
            layer: this layer's number in the cache's keys.
            graphs: those of the cache, which layers share, as their experts differ in weights alone.
            at_the_gate: see :func:`~megatron_scmoe.inference.offloading.connect`.
        """
        self.cache, self.layer, self.dispatcher, self.graphs = cache, layer, dispatcher, graphs
        self._at_the_gate = at_the_gate
        self._drop_weights()

    def hear(self, routing_map: Tensor) -> None:
        """What the gate has chosen, bool [tokens, experts]: padding hides it from the dispatcher."""
        if self.dispatcher.drop_and_pad:
            self._chosen.tell(routing_map)

    def expect(self, tokens_per_expert: Sequence[int]) -> None:
        """Begin to fetch the experts that will get tokens."""
        if not self.dispatcher.drop_and_pad:
            self.cache.request(self._keys(tokens_per_expert))
        elif not is_capturing():  # in graphs the window is launched first
            self.cache.request(self._keys(self._chosen.counts()))

    def forward(self, tokens: Tensor, tokens_per_expert: Tensor, probs: Tensor):
        """As Megatron's experts. Of padded tokens those of experts that nobody chose give 0.

        Args:
            tokens: [tokens, h], sorted by expert.
            tokens_per_expert: int64 [experts].
            probs: [tokens].

        Returns:
            Their outputs [tokens, h], and no bias.
        """
        output = torch.empty_like(tokens)
        if not self.dispatcher.drop_and_pad:
            counts = tokens_per_expert.tolist()
            parts = {
                expert: slice(end - count, end)
                for expert, (count, end) in enumerate(zip(counts, accumulate(counts)))
                if count
            }
            self._compute(parts, tokens, probs, output, self._run)
            return output, None

        rows = len(tokens) // self.num_local_experts
        run = self._run_in_graph if is_capturing() else self._run

        def compute_chosen() -> None:
            output.zero_()  # before the wait: behind it copies start at once
            if not self._at_the_gate:
                self._chosen.is_known_from_now()
            parts = {
                expert: slice(expert * rows, (expert + 1) * rows)
                for expert, count in enumerate(self._chosen.counts())
                if count
            }
            self._compute(parts, tokens, probs, output, run)

        between_graphs(compute_chosen)
        return output, None

    def _compute(
        self,
        parts: Mapping[int, slice],
        tokens: Tensor,
        probs: Tensor,
        output: Tensor,
        run: Compute,
    ) -> None:
        """Fill the outputs of experts that get tokens.

        Args:
            parts: which tokens, by expert.
            tokens: [tokens, h].
            probs: [tokens].
            output: [tokens, h].
            run: what computes one of them.
        """
        keys = [(self.layer, expert) for expert in parts]
        all_come = self.cache.request(keys)
        for position, (key, own) in enumerate(zip(keys, parts.values())):
            if not all_come:
                self.cache.request(keys[position:])
            output[own] = run(self.cache.take(key), tokens[own], probs[own])
            self.cache.release(key)

    def _run(self, weights: Sequence[Tensor], tokens: Tensor, probs: Tensor) -> Tensor:
        """One expert's output."""
        for parameter, weight in zip(self._parameters_of_one.values(), weights, strict=True):
            parameter.data = weight
        return self.expert(tokens, torch.tensor([len(tokens)]), probs)[0]

    def _run_in_graph(self, weights: Sequence[Tensor], tokens: Tensor, probs: Tensor) -> Tensor:
        """The same in a graph."""
        return self.graphs.run(self._run, weights, tokens, probs)

    def sharded_state_dict(self, prefix="", sharded_offsets=(), metadata=None):
        """Nothing: the experts are no part of what is loaded into the model."""
        return {}

    def _drop_weights(self) -> None:
        for parameter in self._parameters_of_one.values():
            parameter.data = parameter.data.new_empty(0)

    def _keys(self, tokens_per_expert: Sequence[int]) -> list[tuple[int, int]]:
        return [(self.layer, expert) for expert, count in enumerate(tokens_per_expert) if count]


class Chosen:
    """How many tokens have chosen each expert, on the host as soon as the gate is through.

    Args:
        experts: how many there are.
    """

    def __init__(self, experts: int):
        pinned = not cpu_backend.is_enabled()
        self._counts = torch.zeros(experts, dtype=torch.int64, pin_memory=pinned)
        self._known: torch.cuda.Event | None = None

    def tell(self, routing_map: Tensor) -> None:
        """What the gate has chosen, bool [tokens, experts]."""
        self._counts.copy_(routing_map.sum(0), non_blocking=True)
        between_graphs(self.is_known_from_now)

    def counts(self) -> list[int]:
        """The host waits for them."""
        assert self._known is not None
        self._known.synchronize()
        return self._counts.tolist()

    def is_known_from_now(self) -> None:
        """Not before all is done that was enqueued."""
        self._known = now()


class ExpertGraphs:
    """CUDA graphs of one expert's compute: one for each place of a cache, and number of tokens.

    They share memory, so an output is to be read before the next one is computed. Each is captured when
    it is needed, so perhaps late in a text: where that fails, experts go on without.
    """

    def __init__(self):
        self._pool = new_pool()
        self._may_capture = True
        self._graphs: dict[tuple[int, int], tuple[Tensor, Tensor, Callable[[], Tensor]]] = {}

    def run(
        self, compute: Compute, weights: Sequence[Tensor], tokens: Tensor, probs: Tensor
    ) -> Tensor:
        """What ``compute`` gives; the first time in a place it is captured."""
        key = weights[0].data_ptr(), len(tokens)
        if key not in self._graphs and self._may_capture:
            inputs = tokens.clone(), probs.clone()
            try:
                replay = capture(lambda: compute(weights, *inputs), self._pool)
                self._graphs[key] = *inputs, replay
            except RuntimeError as error:
                self._may_capture = False
                print(
                    "warning: an expert could not be captured in a CUDA graph "
                    f"({in_words(error, 1)}); those that have none are computed kernel by kernel",
                    file=sys.stderr,
                )
        if key not in self._graphs:
            return compute(weights, tokens, probs)
        own_tokens, own_probs, replay = self._graphs[key]
        own_tokens.copy_(tokens)
        own_probs.copy_(probs)
        return replay()


def named_weights(experts: torch.nn.Module) -> list[dict[str, torch.nn.Parameter]]:
    """The weights of each expert of Megatron's module, by their names in a checkpoint.

    Raises:
        InputError: if it is a module that holds them in another way.
    """
    found: dict[int, dict[str, torch.nn.Parameter]] = {}
    for name, parameter in experts.named_parameters():
        match = _OF_AN_EXPERT.fullmatch(name)
        if match is None:
            raise InputError(
                FLAG,
                f"the experts are of {type(experts).__name__}, with a parameter {name}",
                "SequentialMLP or TEGroupedMLP",
            )
        found.setdefault(int(match[1] or match[3]), {})[match[2]] = parameter
    return [found[expert] for expert in sorted(found)]


_OF_AN_EXPERT = re.compile(r"(?:local_experts\.(\d+)\.)?(linear_fc[12]\.(?:weight|bias))(\d+)?")
"""SequentialMLP has its number before the weight, TEGroupedMLP behind it."""
