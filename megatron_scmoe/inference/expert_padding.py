"""A decode without sizes: every rank sends each of its tokens to every expert.

A dispatch has to know how many tokens go where. The ranks tell each other before it, and on a GPU the
host waits for the numbers, once a layer. For a few tokens that takes longer than to send rows that
nobody needs. So a decode may use Megatron's padding to a capacity, at one that drops no token: all
sizes are known beforehand. Where the router has not chosen an expert, its probability is 0, and so is
what it adds.

The sums are those without padding. On a GPU matrix products of another size may be rounded otherwise;
so the number of tokens decides whether to pad, and not a clock: the same texts are computed alike each
time. On a CPU the experts leave out what pads, and the bits are the same.
"""

from collections.abc import Callable

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor, nn

from megatron_scmoe.config import AUTO, OFF, ON, DecodePadding
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.inference.offloaded_experts import OffloadedExperts
from megatron_scmoe.model.moe_layer import ScMoELayer
from megatron_scmoe.platform import cpu_backend

MOST_ROWS = 256
"""Of all experts together, that a rank sends in one all-to-all, if ``auto`` is to pad."""

MOST_ROWS_OF_GRAPHS = 4096
"""The same where padding is what lets a decode be in CUDA graphs."""


class ExpertPadding:
    """Pads the experts of a model, ScMoE's or Megatron's own, while it reads few tokens.

    Args:
        model: this rank's part of it.
        wanted: ``auto`` pads a few rows, where sizes have to be waited for and the model can be padded.

    Raises:
        ScMoEConfigError: if ``on`` is wanted of a model that cannot.
    """

    def __init__(self, model: nn.Module, wanted: DecodePadding):
        layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        dispatchers = [layer.token_dispatcher for layer in layers]
        shared = any(each.ep_size > 1 for each in dispatchers)
        self.why_not = next(filter(None, map(_why_not, layers)), None)
        """Why the model cannot be padded, if it cannot."""
        self.is_void = not layers
        """Whether the model has no experts."""
        if wanted == ON and self.why_not:
            raise ScMoEConfigError(f"--decode-padding {ON}", self.why_not, f"{AUTO}, {OFF}")
        self._padded = [] if self.why_not else list(map(_Padded, layers))
        self._wanted = wanted
        # Whoever offloads experts waits for the gate anyway.
        offloads = any(isinstance(layer.experts, OffloadedExperts) for layer in layers)
        self._saves_a_wait = (shared or not cpu_backend.is_enabled()) and not offloads
        self._experts = max((each.num_experts for each in self._padded), default=0)

    def applies(self, tokens: int, in_graphs: bool = False) -> bool:
        """Whether experts are padded when every rank reads so many tokens."""
        if not self._padded or self._wanted == OFF:
            return False
        if self._wanted == ON:
            return True
        if in_graphs:
            return tokens * self._experts <= MOST_ROWS_OF_GRAPHS
        return self._saves_a_wait and tokens * self._experts <= MOST_ROWS

    def set(self, pads: bool) -> None:
        """From now on the model's dispatchers pad, or do not.

        While they do, all ranks that share experts have to read equally many tokens.
        """
        for layer in self._padded:
            layer.set(pads)


class _Padded:
    """A layer whose dispatcher can be made to pad: its methods are replaced for as long."""

    def __init__(self, layer: MoELayer):
        dispatcher = layer.token_dispatcher
        assert isinstance(dispatcher, MoEAlltoAllTokenDispatcher)
        self._dispatcher, self._plain = dispatcher, type(dispatcher)
        self.num_experts = dispatcher.num_experts
        # Megatron rounds tokens * topk / experts * factor up, and floats may lie above.
        self._factor = self.num_experts / dispatcher.config.moe_router_topk * (1 - 1e-9)
        self._replaced: dict[str, Callable] = {"dispatch_preprocess": self._to_every_expert}
        if cpu_backend.is_enabled() and not isinstance(layer.experts, OffloadedExperts):
            self._replaced["dispatch_postprocess"] = self._drop_padding
            self._replaced["combine_preprocess"] = self._fill_in_padding

    def set(self, pads: bool) -> None:
        """Pad from now on, or not."""
        dispatcher = self._dispatcher
        dispatcher.drop_and_pad = pads
        dispatcher.moe_expert_capacity_factor = self._factor if pads else None
        if pads:
            dispatcher.input_splits = dispatcher.output_splits = None
            dispatcher.output_splits_tp = None
        for name, method in self._replaced.items():
            dispatcher.__dict__.pop(name, None)
            if pads:
                dispatcher.__dict__[name] = method

    def _to_every_expert(self, hidden_states: Tensor, routing_map: Tensor, probs: Tensor):
        """Megatron's fused permutation, too, needs a map without gaps."""
        everywhere = torch.ones_like(routing_map)
        return self._plain.dispatch_preprocess(self._dispatcher, hidden_states, everywhere, probs)

    def _drop_padding(self, tokens: Tensor, probs: Tensor):
        """What arrived, but for padding: on a CPU the host knows at once what that is."""
        tokens, counts, probs = self._plain.dispatch_postprocess(self._dispatcher, tokens, probs)
        self._kept = probs != 0
        counts = self._kept.view(len(counts), -1).sum(1)
        return tokens[self._kept], counts, probs[self._kept]

    def _fill_in_padding(self, outputs: Tensor) -> Tensor:
        filled = outputs.new_zeros(len(self._kept), *outputs.shape[1:])
        filled[self._kept] = outputs
        return self._plain.combine_preprocess(self._dispatcher, filled)


def _why_not(layer: MoELayer) -> str | None:
    """Why a layer's experts cannot be padded, if they cannot."""
    dispatcher = layer.token_dispatcher
    if not isinstance(dispatcher, MoEAlltoAllTokenDispatcher):
        kind = layer.config.moe_token_dispatcher_type
        return f"the model's --moe-token-dispatcher-type {kind} has no padding"
    if isinstance(layer, ScMoELayer):
        if len(layer.token_dispatchers) > 1:
            return f"the model has --scmoe-chunks {len(layer.token_dispatchers)}"
        if isinstance(layer.experts, OffloadedExperts) and dispatcher.ep_size > 1:
            return "of --offload-experts ranks would fetch those that only pad for other ranks"
    return None
