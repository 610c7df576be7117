"""The router beyond Megatron's: zero experts, biased softmax selection, and how the biases move.

LongCat-Flash's router (arXiv 2509.01322, section 2.1), with N experts, Z zero experts and top-K:

    s = softmax(W x) over N + Z,   chosen = TopK(s + b),   weight_i = scaling factor * s_i
    MoE(x) = sum over chosen i <= N of weight_i E_i(x)  +  (sum over chosen i > N of weight_i) x

The second sum needs no expert: :class:`ZeroExpertOutput` adds it where the tokens are.
"""

import copy
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
from megatron.core.distributed import finalize_model_grads as megatron_finalize_model_grads
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.transformer.moe.router import TopKRouter
from megatron.core.transformer.transformer_config import TransformerConfig
from torch import Tensor

from megatron_scmoe.config import ExpertBias, ScMoEConfig


def needs_own_router(scmoe: ScMoEConfig) -> bool:
    """Whether the configuration asks for anything that Megatron's router has not."""
    return bool(scmoe.zero_experts) or scmoe.expert_bias != "none" or scmoe.router_bias


class ScMoERouter(TopKRouter):
    """Megatron's top-k router over experts and zero experts.

    Everything of Megatron's router (auxiliary losses, z-loss, jitter) sees N + Z experts. Note that
    its auxiliary losses choose experts of their own, by score without the bias.

    Parameters: ``weight`` [N + Z, h]. Buffers, [N + Z] in fp32: ``expert_bias`` with
    ``--scmoe-expert-bias``, ``classifier_bias`` with ``--scmoe-router-bias``.

    Args:
        scmoe: the configuration of ScMoE.
    """

    def __init__(
        self,
        config: TransformerConfig,
        pg_collection: ProcessGroupCollection | None = None,
        is_mtp_layer: bool = False,
        *,
        scmoe: ScMoEConfig,
    ):
        view = copy.copy(config)  # Megatron's router sizes everything by these two
        view.num_moe_experts = config.num_moe_experts + scmoe.zero_experts
        if scmoe.expert_bias != "none":
            view.moe_router_enable_expert_bias = True
        super().__init__(view, pg_collection, is_mtp_layer)
        self._model_config = config  # of the whole model, unlike self.config
        self.num_routed_experts = config.num_moe_experts
        self.bias_rule = scmoe.expert_bias
        self.active_experts = scmoe.active_experts or (
            self.topk * self.num_routed_experts / self.num_experts
        )
        if scmoe.expert_bias != "none":
            self.router_replay = _BiasedSelection(self)
        if scmoe.router_bias:
            zeros = torch.zeros(self.num_experts, device=torch.cuda.current_device())
            self.register_buffer("classifier_bias", zeros)

    def forward(
        self, input: Tensor, padding_mask: Tensor | None = None
    ) -> tuple[Tensor, Tensor, "ZeroExpertOutput | None"]:
        """Route the tokens.

        Args:
            input: [s, b, h].
            padding_mask: [s, b], True for padding.

        Returns:
            Weights [s*b, N] (0 where not chosen), chosen experts [s*b, N] (bool; up to K a row), and
            what the zero experts give, None if there are none.
        """
        if self.enable_expert_bias and self.training:
            move_biases_with(self._model_config)  # a foreign loop may have set its own since
        probs, chosen = super().forward(input, padding_mask)
        real = self.num_routed_experts
        if real == self.num_experts:
            return probs, chosen, None
        weights = probs[:, real:].sum(dim=-1)
        zero = ZeroExpertOutput(input, weights.view(*input.shape[:-1], 1))
        return probs[:, :real].contiguous(), chosen[:, :real].contiguous(), zero

    def _maintain_float32_expert_bias(self) -> None:
        """Also counts and the kept bias: a model in bf16 casts every buffer, and bf16 counts to 256."""
        super()._maintain_float32_expert_bias()
        for name in ("local_tokens_per_expert", "classifier_bias"):
            buffer = getattr(self, name, None)
            if buffer is not None:
                buffer.data = buffer.data.float()


class ZeroExpertOutput:
    """What the zero experts give for tokens x: x times the sum of their weights.

    Args:
        tokens: x, [s, b, h].
        weights: [s, b, 1], in the router's dtype.
    """

    def __init__(self, tokens: Tensor, weights: Tensor):
        self._tokens = tokens
        self._weights = weights

    def add_to(self, routed: Tensor) -> Tensor:
        """``routed`` [s, b, h], the output of the other experts, with this added."""
        return routed + (self._tokens * self._weights).to(routed.dtype)


class _BiasedSelection:
    """Choose by score + bias, weigh by score.

    Stands where Megatron's router asks for a replayed choice (``moe_enable_routing_replay``): the
    one place that lets softmax scores and the choice of experts differ.
    """

    def __init__(self, router: ScMoERouter):
        self.router = router
        self.layer_number: int | None = None  # set by Megatron

    def get_replay_topk(
        self,
        scores: Tensor,
        topk: int,
        num_groups: int | None,
        group_topk: int | None,
        compute_topk: Callable,
    ) -> tuple[Tensor, Tensor]:
        """Scores of the chosen experts and their indices, [n, topk] each, of ``scores`` [n, N + Z]."""
        biased = scores.detach() + self.router.expert_bias
        _, indices = compute_topk(biased, topk, num_groups=num_groups, group_topk=group_topk)
        return scores.gather(1, indices), indices


def finalize_model_grads(model: list[torch.nn.Module], *args, **kwargs) -> None:
    """Megatron's step between backward and optimizer, then the update of the biases."""
    megatron_finalize_model_grads(model, *args, **kwargs)
    update_expert_biases(module for chunk in model for module in chunk.modules())


def move_biases_with(config: TransformerConfig) -> None:
    """Have the biases move once a step, behind whatever ``config.finalize_model_grads_func`` is.

    Megatron's schedules call that function after the last backward of a step; its training loop keeps
    what it finds there. A foreign loop may set its own later: a router in training calls this again.
    """
    finalize = config.finalize_model_grads_func
    if finalize is not finalize_model_grads and not isinstance(finalize, _ThenMoveBiases):
        config.finalize_model_grads_func = _ThenMoveBiases(finalize)


@dataclass(frozen=True)
class _ThenMoveBiases:
    """Another function of that kind (None: nothing), then the update of the biases."""

    finalize: Callable | None

    def __call__(self, model: list[torch.nn.Module], *args, **kwargs) -> None:
        if self.finalize is not None:
            self.finalize(model, *args, **kwargs)
        update_expert_biases(module for chunk in model for module in chunk.modules())


@torch.no_grad()
def update_expert_biases(modules: Iterable[torch.nn.Module]) -> None:
    """Move the bias of every router in training by the tokens of this global batch, and forget these.

    The counts are summed over the tensor-, context- and data-parallel ranks, as Megatron does for
    its own rule; see :func:`bias_step`.
    """
    routers = [
        module
        for module in modules
        if isinstance(module, ScMoERouter)
        and module.enable_expert_bias
        and module.training
        and not module.frozen_expert_bias
    ]
    if not routers:
        return
    counts = torch.stack([router.local_tokens_per_expert for router in routers])
    torch.distributed.all_reduce(counts, group=routers[0].tp_dp_cp_group)
    for router, tokens in zip(routers, counts):
        target = router.active_experts / (router.topk * router.num_routed_experts)
        step = bias_step(tokens, router.num_routed_experts, target, router.bias_rule)
        step *= tokens.sum() > 0  # if not, they have moved in this step
        router.expert_bias += router.config.moe_router_bias_update_rate * step
        router.local_tokens_per_expert.zero_()


def bias_step(
    tokens_per_expert: Tensor, num_routed: int, target: float, rule: ExpertBias
) -> Tensor:
    """The change of the biases in units of the update rate mu (LongCat-Flash report, section 2.1.1).

        proportional:  K_e / (K N) - T_i / (K T_all)   for the N experts,   0 for zero experts
        sign:          the sign of that

    T_i is the number of tokens routed to expert i in the global batch, T_all the number of tokens, K
    the experts chosen per token with zero experts counted, and K_e the number of experts that a
    token should use on average with zero experts left out (about 8 of 12 in LongCat-Flash). So
    K_e / (K N) is the share of all choices that one expert should get and T_i / (K T_all) the share
    it got; nothing is dropped, so K T_all is the sum of all T_i.

    Args:
        tokens_per_expert: T, [N + Z].
        num_routed: N.
        target: K_e / (K N).
        rule: "proportional" or "sign".

    Returns:
        [N + Z], in the dtype of ``tokens_per_expert``.
    """
    lacking = target - tokens_per_expert / tokens_per_expert.sum().clamp(min=1)
    lacking[num_routed:] = 0
    return lacking.sign() if rule == "sign" else lacking
