"""A decode without sizes: every rank sends each of its tokens to every expert.

A dispatch has to know how many tokens go where. The ranks tell each other before it, and on a GPU the
host waits for the numbers, once a layer. For a few tokens that takes longer than to send rows that
nobody needs. So a decode may use Megatron's padding to a capacity, at one that drops no token: all
sizes are known beforehand. Where the router has not chosen an expert, its probability is 0, and so is
what it adds.

The sums are those without padding; matrix products of another size may be rounded otherwise. So the
number of tokens decides whether to pad, and not a clock: the same texts are computed alike each time.
"""

from functools import partial

import torch
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.moe.token_dispatcher import MoEAlltoAllTokenDispatcher
from torch import Tensor, nn

from megatron_scmoe.config import OFF, ON, DecodePadding
from megatron_scmoe.platform import cpu_backend

MOST_ROWS = 256
"""Of all experts together, that a rank sends in one all-to-all, if ``auto`` is to pad."""


class ExpertPadding:
    """Pads the experts of a model, ScMoE's or Megatron's own, while it reads few tokens.

    Args:
        model: this rank's part of it. Nothing is padded with other dispatchers than the all-to-all's,
            with several token chunks, or if somebody acts on how many tokens an expert gets.
        wanted: ``auto`` pads up to :data:`MOST_ROWS` rows, where sizes have to be waited for.
    """

    def __init__(self, model: nn.Module, wanted: DecodePadding):
        layers = [module for module in model.modules() if isinstance(module, MoELayer)]
        dispatchers = [layer.token_dispatcher for layer in layers]
        waits = any(each.ep_size > 1 for each in dispatchers) or not cpu_backend.is_enabled()
        self._dispatchers = dispatchers if all(map(_can_be_padded, layers)) else []
        self._most = {ON: float("inf"), OFF: 0}.get(wanted, MOST_ROWS if waits else 0)
        self._experts = max((each.num_experts for each in self._dispatchers), default=0)

    def applies(self, tokens: int) -> bool:
        """Whether experts are padded when every rank reads so many tokens."""
        return bool(self._dispatchers) and tokens * self._experts <= self._most

    def set(self, pads: bool) -> None:
        """From now on the model's dispatchers pad, or do not.

        While they do, all ranks that share experts have to read equally many tokens.
        """
        for dispatcher in self._dispatchers:
            dispatcher.drop_and_pad = pads
            if pads:
                # Megatron rounds tokens * topk / experts * factor up, and floats may lie above.
                factor = dispatcher.num_experts / dispatcher.config.moe_router_topk
                dispatcher.moe_expert_capacity_factor = factor * (1 - 1e-9)
                dispatcher.input_splits = dispatcher.output_splits = None
                dispatcher.output_splits_tp = None
                dispatcher.dispatch_preprocess = partial(
                    _to_every_expert, type(dispatcher).dispatch_preprocess, dispatcher
                )
            else:
                dispatcher.moe_expert_capacity_factor = None
                dispatcher.__dict__.pop("dispatch_preprocess", None)


def _can_be_padded(layer: MoELayer) -> bool:
    dispatchers = getattr(layer, "token_dispatchers", [layer.token_dispatcher])
    path = getattr(layer, "path", None)
    return (
        len(dispatchers) == 1
        and isinstance(dispatchers[0], MoEAlltoAllTokenDispatcher)
        and (path is None or path.on_dispatch is None)
    )


def _to_every_expert(plain, dispatcher, hidden_states: Tensor, routing_map: Tensor, probs: Tensor):
    """Megatron's ``dispatch_preprocess``; its fused permutation, too, needs a map without gaps."""
    return plain(dispatcher, hidden_states, torch.ones_like(routing_map), probs)
