"""Rules of activation recompute."""

from megatron_scmoe.config import ScMoEConfig, needs_dense_partner
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.validation.rule import rule
from megatron_scmoe.validation.settings import Settings


@rule("--recompute-modules")
def moe_is_not_recomputed_alone(scmoe: ScMoEConfig, settings: Settings) -> None:
    if "moe" in _selected_modules(settings):
        raise ScMoEConfigError(
            "--recompute-modules moe",
            "the routed path runs beside two blocks and cannot be recomputed as one piece",
            "moe_act, shared_experts, layernorm, mlp, core_attn, or --recompute-granularity full",
        )


@rule("--recompute-method")
def pairs_are_not_recomputed_by_block(scmoe: ScMoEConfig, settings: Settings) -> None:
    if _recomputes_pairs(scmoe, settings) and settings.recompute_method == "block":
        raise ScMoEConfigError(
            "--recompute-method block",
            "it recomputes block by block and would split the pairs",
            "--recompute-method uniform --recompute-num-layers 2",
        )


@rule("--recompute-num-layers")
def recompute_chunks_hold_whole_pairs(scmoe: ScMoEConfig, settings: Settings) -> None:
    number = settings.recompute_num_layers
    if _recomputes_pairs(scmoe, settings) and number is not None and number % 2:
        raise ScMoEConfigError(
            f"--recompute-num-layers {number}",
            "a recompute chunk must hold whole pairs of blocks",
            f"{number + 1}" if number == 1 else f"{number - 1} or {number + 1}",
        )


@rule("--recompute-modules", "--transformer-impl")
def local_modules_are_recomputed(scmoe: ScMoEConfig, settings: Settings) -> None:
    needs_te = {"layernorm", "moe_act", "mla_up_proj"} & _selected_modules(settings)
    if settings.transformer_impl == "local" and needs_te:
        raise ScMoEConfigError(
            f"--recompute-modules {sorted(needs_te)[0]} with --transformer-impl local",
            "Megatron recomputes it with Transformer Engine",
            "core_attn, mlp, shared_experts, or --transformer-impl transformer_engine",
        )


def _selected_modules(settings: Settings) -> set[str]:
    is_selective = settings.recompute_granularity == "selective"
    return set(settings.recompute_modules or ()) if is_selective else set()


def _recomputes_pairs(scmoe: ScMoEConfig, settings: Settings) -> bool:
    return settings.recompute_granularity == "full" and needs_dense_partner(scmoe)
