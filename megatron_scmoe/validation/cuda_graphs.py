"""Rules of CUDA graphs: what may be captured, alone and with the routing in its graph."""

import os

import torch
from megatron.core.utils import is_torch_min_version

from megatron_scmoe.config import ScMoEConfig, wanted_slot
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.overlap.schedule import TAP_BOUNDARY, Boundary, slot_behind_second_attention
from megatron_scmoe.validation.rule import rule
from megatron_scmoe.validation.settings import Settings, as_list


@rule("--cuda-graph-impl")
def transformer_engine_captures(scmoe: ScMoEConfig, settings: Settings) -> None:
    impl = settings.cuda_graph_impl
    if _captures(settings) and impl != "transformer_engine":
        raise ScMoEConfigError(
            f"--cuda-graph-impl {impl}",
            "a captured block cannot tell the routed path what it has passed",
            "none, or transformer_engine with --cuda-graph-modules attn",
        )


@rule("--cuda-graph-modules")
def captured_modules_lie_between_boundaries(scmoe: ScMoEConfig, settings: Settings) -> None:
    modules = _modules(settings)
    routing = {"attn", "moe_router", "moe_preprocess"}
    if _captures(settings) and set(modules) not in ({"attn"}, routing, routing | {"mlp"}):
        raise ScMoEConfigError(
            f"--cuda-graph-modules {' '.join(modules) or '(none, which is all)'}",
            "parts of a block alone lie between boundaries of the routed path",
            "attn, attn moe_router moe_preprocess, or attn mlp moe_router moe_preprocess",
        )


@rule(
    "--cuda-graph-modules",
    "--scmoe-tap",
    "--scmoe-router-norm",
    "--scmoe-chunks",
    "--scmoe-zero-experts",
    "--scmoe-expert-bias",
    "--moe-latent-size",
    "--moe-expert-capacity-factor",
    "--moe-router-padding-for-quantization",
    "--moe-enable-routing-replay",
    "--moe-router-load-balancing-type",
    "--moe-token-dispatcher-type",
)
def captured_routing_is_whole(scmoe: ScMoEConfig, settings: Settings) -> None:
    if not _captures_routing(settings):
        return
    for wrong, given in (
        (scmoe.tap == "pos1", f"--scmoe-tap {scmoe.tap}"),
        (scmoe.router_norm != "own", f"--scmoe-router-norm {scmoe.router_norm}"),
        (scmoe.chunks > 1, f"--scmoe-chunks {scmoe.chunks}"),
        (scmoe.zero_experts > 0, f"--scmoe-zero-experts {scmoe.zero_experts}"),
        (scmoe.expert_bias != "none", f"--scmoe-expert-bias {scmoe.expert_bias}"),
        (settings.moe_latent_size, f"--moe-latent-size {settings.moe_latent_size}"),
        (
            settings.moe_expert_capacity_factor is not None,
            f"--moe-expert-capacity-factor {settings.moe_expert_capacity_factor}",
        ),
        (settings.moe_router_padding_for_quantization, "--moe-router-padding-for-quantization"),
        (settings.moe_enable_routing_replay, "--moe-enable-routing-replay"),
        (
            "sinkhorn" in as_list(settings.moe_router_load_balancing_type),
            "--moe-router-load-balancing-type sinkhorn",
        ),
        (
            settings.moe_token_dispatcher_type != "alltoall",
            f"--moe-token-dispatcher-type {settings.moe_token_dispatcher_type}",
        ),
    ):
        if wrong:
            raise ScMoEConfigError(
                f"--cuda-graph-modules moe_router with {given}",
                "routing is captured with the attention it lies beside, and as a whole",
                "attn",
            )


@rule("--cuda-graph-modules")
def torch_has_events_inside_graphs(scmoe: ScMoEConfig, settings: Settings) -> None:
    if _captures_routing(settings) and not is_torch_min_version("2.9.0a0"):
        raise ScMoEConfigError(
            _given_modules(settings),
            f"events inside a graph need torch 2.9; this is {torch.__version__}",
            "attn",
        )


@rule("--cuda-graph-modules", "--scmoe-tap")
def dispatch_does_not_queue_behind_its_graph(scmoe: ScMoEConfig, settings: Settings) -> None:
    has_one_queue = os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") == "1"
    if _computes_behind_routing(scmoe, settings) and scmoe.overlap and has_one_queue:
        raise ScMoEConfigError(
            f"{_given_modules(settings)} with --scmoe-tap {scmoe.tap} and "
            "CUDA_DEVICE_MAX_CONNECTIONS=1",
            "one hardware queue would run the dispatch behind the whole graph",
            "attn, or CUDA_DEVICE_MAX_CONNECTIONS=32",
        )


@rule("--scmoe-expert-slot", "--cuda-graph-modules", "--scmoe-tap")
def slot_auto_is_not_measured_captured(scmoe: ScMoEConfig, settings: Settings) -> None:
    if _computes_behind_routing(scmoe, settings) and scmoe.expert_slot == "auto":
        behind = slot_behind_second_attention(scmoe.tap)
        raise ScMoEConfigError(
            f"--scmoe-expert-slot auto with {_given_modules(settings)} with --scmoe-tap "
            f"{scmoe.tap}",
            "slots are measured uncaptured, and in backward this graph is one piece",
            f"a number; the second attention lies between tap and slot {behind}",
        )


@rule("--scmoe-expert-slot", "--cuda-graph-modules", "--scmoe-tap")
def dispatch_has_compute_beside_it_in_backward(scmoe: ScMoEConfig, settings: Settings) -> None:
    slot = wanted_slot(scmoe)
    behind = slot_behind_second_attention(scmoe.tap)
    exchanges = scmoe.overlap and (settings.expert_model_parallel_size or 1) > 1
    captures_mlp = _captures_routing(settings) and "mlp" in _modules(settings)
    if captures_mlp and exchanges and slot != "auto" and slot < behind:
        raise ScMoEConfigError(
            f"--scmoe-expert-slot {slot} with {_given_modules(settings)} with --scmoe-tap "
            f"{scmoe.tap}",
            "in backward this graph is one piece: the dispatch would have no compute beside it",
            f"--scmoe-expert-slot {behind}, or --cuda-graph-modules without mlp",
        )


@rule("--cuda-graph-impl", "--transformer-impl")
def modules_of_transformer_engine_are_captured(scmoe: ScMoEConfig, settings: Settings) -> None:
    if _captures(settings) and settings.transformer_impl != "transformer_engine":
        raise ScMoEConfigError(
            f"{_GIVEN} with --transformer-impl {settings.transformer_impl}",
            "Transformer Engine captures its own modules",
            "--cuda-graph-impl none",
        )


@rule("--cuda-graph-impl", "--multi-latent-attention")
def latent_attention_is_not_captured(scmoe: ScMoEConfig, settings: Settings) -> None:
    if _captures(settings) and settings.multi_latent_attention:
        raise ScMoEConfigError(
            f"{_GIVEN} with --multi-latent-attention",
            "capturing latent attention has not been tried",
            "--cuda-graph-impl none",
        )


@rule("--cuda-graph-impl", "--bf16")
def inputs_of_graphs_are_bf16(scmoe: ScMoEConfig, settings: Settings) -> None:
    if _captures(settings) and not settings.bf16:
        raise ScMoEConfigError(
            f"{_GIVEN} without --bf16", "Megatron captures for inputs in bf16", "--bf16"
        )


@rule("--cuda-graph-impl", "--fp32-residual-connection")
def residual_of_graphs_is_bf16(scmoe: ScMoEConfig, settings: Settings) -> None:
    if _captures(settings) and settings.fp32_residual_connection:
        raise ScMoEConfigError(
            f"{_GIVEN} with --fp32-residual-connection",
            "a graph's input is bf16: the residual would be rounded at every block",
            "--cuda-graph-impl none",
        )


@rule("--cuda-graph-impl", "--position-embedding-type")
def positions_are_captured(scmoe: ScMoEConfig, settings: Settings) -> None:
    """Of flags alone: a ``TransformerConfig`` does not hold the kind of positions."""
    positions = settings.position_embedding_type
    if _captures(settings) and positions not in (None, "rope", "learned_absolute", "none"):
        raise ScMoEConfigError(
            f"{_GIVEN} with --position-embedding-type {positions}",
            "Megatron captures attention without these positions",
            "--position-embedding-type rope, learned_absolute or none",
        )


_GIVEN = "--cuda-graph-impl transformer_engine"


def _captures(settings: Settings) -> bool:
    return settings.cuda_graph_impl not in (None, "", "none")


def _modules(settings: Settings) -> list[str]:
    """What is captured of a block, by the names that the flag takes."""
    given = settings.cuda_graph_modules or settings.cuda_graph_scope_deprecated or []
    return list(dict.fromkeys(getattr(module, "name", module) for module in as_list(given)))


def _given_modules(settings: Settings) -> str:
    return f"--cuda-graph-modules {' '.join(_modules(settings))}"


def _captures_routing(settings: Settings) -> bool:
    return _captures(settings) and len(_modules(settings)) > 1


def _computes_behind_routing(scmoe: ScMoEConfig, settings: Settings) -> bool:
    """Whether compute follows the routing in its graph: the dispatch begins in the midst of it."""
    reads_input = TAP_BOUNDARY[scmoe.tap] is Boundary.PAIR_INPUT
    has_compute = "mlp" in _modules(settings) or reads_input
    return _captures_routing(settings) and has_compute
