"""Megatron's token dispatchers with dispatch and combine split into launch and arrival.

Each class keeps what Megatron's dispatcher does before and after the communication and replaces
only the communication itself: the ``arrive`` of a launched flight gives what Megatron's
``token_dispatch`` and ``token_combine`` would have returned.
"""

from collections.abc import Callable

import torch
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.token_dispatcher import (
    MoEAllGatherTokenDispatcher,
    MoEAlltoAllTokenDispatcher,
    MoEFlexTokenDispatcher,
    MoETokenDispatcher,
)
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.overlap.async_all_to_all import (
    AllToAll,
    CompletedExchange,
    Flight,
    OnLaunchStream,
    launch_stream,
)
from megatron_scmoe.overlap.exchanges import exchange_for


class ScMoEAlltoAllTokenDispatcher(MoEAlltoAllTokenDispatcher):
    """The all-to-all dispatcher; the exchange is asynchronous on NCCL and on gloo alike."""

    probs: Tensor  # Megatron's
    tokens_per_expert: Tensor  # Megatron's

    exchange: Callable[..., AllToAll] = AllToAll
    """What makes each exchange of its group, of what :class:`AllToAll` takes."""
    choices_vary = False
    """Whether tokens may have fewer than topk experts: with zero experts, see router.py."""

    _STATE = (
        "tokens_per_expert",
        "input_splits",
        "output_splits",
        "output_splits_tp",
        "num_global_tokens_per_local_expert",
        "reversed_local_input_permutation_mapping",
        "routing_map",
    )
    """What later steps read of the routing, where it is a tensor."""

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        # Megatron copies the split sizes late if modules are captured. What is not replayed, as in
        # warm-up and evaluation, would then wait for them behind the compute beside the dispatch.
        self.cuda_dtoh_point = "before_permutation_1"

    def capture_permutation(
        self, hidden_states: Tensor, probs: Tensor, routing_map: Tensor
    ) -> tuple[Tensor, Tensor, dict[str, Tensor]]:
        """Permute while a CUDA graph is captured; the copy of the split sizes is left for later.

        Args:
            hidden_states: [s, b, h].
            probs: [s * b, num_experts].
            routing_map: [s * b, num_experts], bool.

        Returns:
            Permuted tokens and probabilities, and the tensors that later steps read.
        """
        self.cuda_dtoh_point = "before_ep_alltoall"
        tokens, permuted_probs = self.dispatch_preprocess(hidden_states, routing_map, probs)
        self.cuda_dtoh_point = "before_permutation_1"
        self.probs = self.probs.detach()  # later steps read its dtype only
        found = {name: getattr(self, name, None) for name in self._STATE}
        state = {name: value for name, value in found.items() if isinstance(value, Tensor)}
        return tokens, permuted_probs, state

    def resume_permutation(
        self,
        tokens: Tensor,
        probs: Tensor,
        state: dict[str, Tensor],
        shape: torch.Size,
        ready: torch.cuda.Event,
    ) -> Flight | CompletedExchange:
        """Continue after a replay, and start the copy of the split sizes.

        Args:
            tokens, probs, state: what the graph gave for what :meth:`capture_permutation` returned.
            shape: of the hidden states, [s, b, h].
            ready: when that part of the graph is through.
        """
        for name, value in state.items():
            setattr(self, name, value)
        self.hidden_shape = shape
        self.hidden_shape_before_permute = torch.Size((shape[0] * shape[1], shape[2]))
        with launch_stream(ready):  # Megatron's copy waits for the stream it is issued on
            self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
                self.cuda_dtoh_point, self.tokens_per_expert
            )
        return self.prepare_dispatch(tokens, probs, ready)

    def preprocess(self, routing_map: Tensor) -> Tensor:
        """As in Megatron, whose dropless case takes it that every token has topk experts."""
        tokens_per_local_expert = super().preprocess(routing_map)
        if self.choices_vary and not self.drop_and_pad:
            self.num_out_tokens = routing_map.sum()
            self._maybe_update_cuda_sync_point("before_permutation_1")
        return tokens_per_local_expert

    def prepare_dispatch(
        self, tokens: Tensor, probs: Tensor, ready: torch.cuda.Event | None = None
    ) -> Flight | CompletedExchange:
        """Take the permuted tokens as they are now; the host need not know the split sizes yet.

        Args:
            tokens: [num_local_tokens * topk, h], sorted by expert.
            probs: [num_local_tokens * topk], fp32 unless the router's dtype says otherwise.
            ready: when they are final, if not now.
        """
        if self.ep_size == 1:
            return CompletedExchange(*self.token_dispatch(tokens, probs))
        return Flight(tokens, probs, ready=ready)

    def launch_dispatch(self, flight: Flight | CompletedExchange) -> None:
        """Start sending the tokens to the ranks of their experts; the host waits for the sizes."""
        if isinstance(flight, CompletedExchange):
            return
        # Megatron copies the split sizes to the host on a stream of their own; now they are needed.
        self.tokens_per_expert = self._maybe_dtoh_and_synchronize(
            "before_ep_alltoall", self.tokens_per_expert
        )
        received, sent = _as_list(self.output_splits), _as_list(self.input_splits)
        flight.launch(self.exchange(self.ep_group, received, sent, "dispatch"))

    def local_counts(self) -> list[int]:
        """How many tokens each expert of this rank gets; between a dispatch's launch and arrival.

        The host waits for Megatron's copy of the counts, which began with the permutation.
        """
        if not self.drop_and_pad:
            self.d2h_event.synchronize()
        return self.tokens_per_expert.tolist()

    def launch_combine(self, tokens: Tensor) -> Flight | CompletedExchange:
        """Start sending expert outputs [num_received_tokens, h] back where the tokens came from."""
        if self.ep_size == 1:
            return CompletedExchange(self.token_combine(tokens))
        flight = Flight(tokens)
        received, sent = _as_list(self.input_splits), _as_list(self.output_splits)
        flight.launch(self.exchange(self.ep_group, received, sent, "combine"))
        return flight


class ScMoEFlexTokenDispatcher(MoEFlexTokenDispatcher):
    """DeepEP, HybridEP and NCCL EP; their kernels run on a stream beside the compute."""

    def prepare_dispatch(self, tokens: Tensor, probs: Tensor) -> Flight:
        """See :meth:`ScMoEAlltoAllTokenDispatcher.prepare_dispatch`; tokens [num_local_tokens, h]."""
        return Flight(tokens, probs)

    def launch_dispatch(self, flight: Flight) -> None:
        """Start the fused permutation and dispatch."""
        flight.launch(OnLaunchStream(self._dispatch))

    def launch_combine(self, tokens: Tensor) -> Flight:
        """See :meth:`ScMoEAlltoAllTokenDispatcher.launch_combine`."""
        flight = Flight(tokens)
        flight.launch(OnLaunchStream(lambda tokens: (self.token_combine(tokens),)))
        return flight

    def dispatch_postprocess(self, hidden_states: Tensor, probs: Tensor):
        """As in Megatron, whose manager reads its own probabilities: these are the arrived ones."""
        self._comm_manager.dispatched_probs = probs
        return super().dispatch_postprocess(hidden_states, probs)

    def _dispatch(self, tokens: Tensor, probs: Tensor) -> tuple[Tensor, Tensor]:
        self._comm_manager.token_probs = probs
        return self.token_dispatch(tokens, probs)


class ScMoEAllGatherTokenDispatcher(MoEAllGatherTokenDispatcher):
    """The all-gather dispatcher, in line: it is wired for ``--no-scmoe-overlap`` only."""

    def prepare_dispatch(self, tokens: Tensor, probs: Tensor) -> CompletedExchange:
        """Gather the tokens of all ranks."""
        return CompletedExchange(*self.token_dispatch(tokens, probs))

    def launch_dispatch(self, flight: CompletedExchange) -> None:
        """Nothing is left to do."""

    def launch_combine(self, tokens: Tensor) -> CompletedExchange:
        """Reduce and scatter the outputs of all ranks."""
        return CompletedExchange(self.token_combine(tokens))


_DISPATCHERS = {
    "alltoall": ScMoEAlltoAllTokenDispatcher,
    "flex": ScMoEFlexTokenDispatcher,
    "allgather": ScMoEAllGatherTokenDispatcher,
}


def build_token_dispatcher(
    config: TransformerConfig,
    num_local_experts: int,
    local_expert_indices: list[int],
    pg_collection: ProcessGroupCollection,
    scmoe: ScMoEConfig,
) -> MoETokenDispatcher:
    """The dispatcher named by ``--moe-token-dispatcher-type``.

    Args:
        num_local_experts: of this rank.
        local_expert_indices: their numbers among all experts.
        scmoe: says what carries the all-to-alls, and whether there are zero experts.

    Raises:
        CopyEngineError: if copy engines cannot serve the expert-parallel group.
    """
    dispatcher = _DISPATCHERS[config.moe_token_dispatcher_type](
        num_local_experts, local_expert_indices, config=config, pg_collection=pg_collection
    )
    if isinstance(dispatcher, ScMoEAlltoAllTokenDispatcher):
        dispatcher.exchange = exchange_for(pg_collection.ep, scmoe)
        dispatcher.choices_vary = scmoe.zero_experts > 0
    return dispatcher


def _as_list(splits) -> list[int] | None:
    """Split sizes as PyTorch's collectives want them; None (equal splits) stays None."""
    return None if splits is None else [int(size) for size in splits]
