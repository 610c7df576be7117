"""Rules of the router: Megatron's, and this package's own with zero experts and biased choices."""

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.validation.rule import Refused, rule
from megatron_scmoe.validation.settings import Settings, as_list, kinds_with_own_choice


@rule("--moe-router-topk", "--moe-router-pre-softmax")
def one_expert_has_a_gradient(scmoe: ScMoEConfig, settings: Settings) -> None:
    if (
        settings.moe_router_topk == 1
        and settings.moe_router_score_function == "softmax"
        and not settings.moe_router_pre_softmax
        and "sinkhorn" not in as_list(settings.moe_router_load_balancing_type)
    ):
        raise ScMoEConfigError(
            "--moe-router-topk 1 without --moe-router-pre-softmax",
            "a softmax over the one kept logit is 1 and gives the router no gradient",
            "--moe-router-pre-softmax, or --moe-router-score-function sigmoid",
        )


@rule("--moe-router-topk")
def there_are_topk_experts(scmoe: ScMoEConfig, settings: Settings) -> None:
    topk = settings.moe_router_topk
    experts = settings.num_moe_experts + max(scmoe.zero_experts, 0)
    if topk is not None and not 1 <= topk <= experts:
        raise ScMoEConfigError(
            f"--moe-router-topk {topk}",
            f"there are {experts} experts" + (", zero experts counted" * bool(scmoe.zero_experts)),
            str(min(max(topk, 1), experts)),
        )


@rule("--scmoe-zero-experts")
def zero_experts_are_a_number(scmoe: ScMoEConfig, settings: Settings) -> None:
    if scmoe.zero_experts < 0:
        raise ScMoEConfigError(
            f"--scmoe-zero-experts {scmoe.zero_experts}", "it is a number of experts", "0 or more"
        )


@rule("--scmoe-expert-bias", "--moe-router-enable-expert-bias")
def there_is_one_bias(scmoe: ScMoEConfig, settings: Settings) -> None:
    if _is_biased(scmoe) and settings.moe_router_enable_expert_bias:
        raise ScMoEConfigError(
            f"{_own_router(scmoe)} with --moe-router-enable-expert-bias",
            "each gives the router a bias",
            "--scmoe-expert-bias for softmax scores, --moe-router-enable-expert-bias for others",
        )


@rule("--scmoe-expert-bias", "--moe-router-score-function", "--moe-router-pre-softmax")
def bias_is_for_softmax_of_all_experts(scmoe: ScMoEConfig, settings: Settings) -> None:
    is_softmax = settings.moe_router_score_function == "softmax" and settings.moe_router_pre_softmax
    if _is_biased(scmoe) and not is_softmax:
        raise ScMoEConfigError(
            f"{_own_router(scmoe)} without --moe-router-score-function softmax "
            "--moe-router-pre-softmax",
            "the bias is added to softmax scores of all experts",
            "both flags, or --moe-router-enable-expert-bias for other scores",
        )


@rule("--scmoe-active-experts")
def active_experts_are_aimed_at_by_a_bias(scmoe: ScMoEConfig, settings: Settings) -> None:
    if scmoe.active_experts is not None and not _is_biased(scmoe):
        raise ScMoEConfigError(
            f"--scmoe-active-experts {scmoe.active_experts}",
            "it is what --scmoe-expert-bias aims at",
            "--scmoe-expert-bias proportional, or leave the flag out",
        )


@rule("--scmoe-active-experts")
def active_experts_are_among_topk(scmoe: ScMoEConfig, settings: Settings) -> None:
    topk = settings.moe_router_topk
    if scmoe.active_experts is not None and not 0 < scmoe.active_experts <= topk:
        raise ScMoEConfigError(
            f"--scmoe-active-experts {scmoe.active_experts}",
            f"a token has {topk} experts (--moe-router-topk)",
            f"more than 0, up to {topk}",
        )


@rule("--scmoe-active-experts", "--scmoe-zero-experts")
def fewer_active_experts_need_zero_experts(scmoe: ScMoEConfig, settings: Settings) -> None:
    topk = settings.moe_router_topk
    if scmoe.active_experts not in (None, topk) and not scmoe.zero_experts:
        raise ScMoEConfigError(
            f"--scmoe-active-experts {scmoe.active_experts} without --scmoe-zero-experts",
            f"every token then has all its {topk} experts (--moe-router-topk), whatever the biases",
            f"leave the flag out, {topk}, or --scmoe-zero-experts",
        )


_NOT_KNOWN = "it does not know them"

NOT_WITH_OWN_ROUTER = (
    Refused(
        "moe_router_load_balancing_type",
        "--moe-router-load-balancing-type",
        _NOT_KNOWN,
        "aux_loss, seq_aux_loss, global_aux_loss or none",
        kinds_with_own_choice,
    ),
    Refused(
        "moe_expert_capacity_factor",
        "--moe-expert-capacity-factor",
        _NOT_KNOWN,
        "leave the flag out",
        lambda value: value is not None,
    ),
    Refused("moe_router_fusion", "--moe-router-fusion", _NOT_KNOWN, "leave the flag out"),
    Refused(
        "moe_enable_routing_replay",
        "--moe-enable-routing-replay",
        _NOT_KNOWN,
        "leave the flag out",
    ),
)
"""Options of the router that know neither zero experts nor a bias beside softmax scores."""


@rule(*(row.flag for row in NOT_WITH_OWN_ROUTER), "--scmoe-zero-experts", "--scmoe-expert-bias")
def own_router_knows_the_options(scmoe: ScMoEConfig, settings: Settings) -> None:
    if not scmoe.zero_experts and not _is_biased(scmoe):
        return
    for row in NOT_WITH_OWN_ROUTER:
        if given := row.given(settings):
            raise ScMoEConfigError(f"{given} with {_own_router(scmoe)}", row.reason, row.accepted)


@rule("--moe-router-num-groups", "--scmoe-zero-experts", "--scmoe-expert-bias")
def zero_experts_are_in_no_group(scmoe: ScMoEConfig, settings: Settings) -> None:
    if scmoe.zero_experts and settings.moe_router_num_groups:
        raise ScMoEConfigError(
            f"--moe-router-num-groups {settings.moe_router_num_groups} with {_own_router(scmoe)}",
            "zero experts belong to no group",
            "leave the flag out",
        )


@rule("--moe-token-dispatcher-type", "--scmoe-zero-experts", "--scmoe-expert-bias")
def zero_experts_are_not_dispatched_by_flex(scmoe: ScMoEConfig, settings: Settings) -> None:
    if scmoe.zero_experts and settings.moe_token_dispatcher_type == "flex":
        raise ScMoEConfigError(
            f"--moe-token-dispatcher-type flex with {_own_router(scmoe)}",
            "its kernels take it that every token has --moe-router-topk experts to go to",
            "--moe-token-dispatcher-type alltoall",
        )


def _is_biased(scmoe: ScMoEConfig) -> bool:
    return scmoe.expert_bias != "none"


def _own_router(scmoe: ScMoEConfig) -> str:
    """The flag that asks for the own router."""
    if _is_biased(scmoe):
        return f"--scmoe-expert-bias {scmoe.expert_bias}"
    return f"--scmoe-zero-experts {scmoe.zero_experts}"
