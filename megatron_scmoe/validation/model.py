"""Rules of the blocks, of the shared expert, and of what Megatron's implementations can compute."""

import torch

from megatron_scmoe.config import ScMoEConfig, moe_pattern
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.validation.rule import rule
from megatron_scmoe.validation.settings import Settings


@rule("--num-experts")
def there_are_experts(scmoe: ScMoEConfig, settings: Settings) -> None:
    if not settings.num_moe_experts:
        raise ScMoEConfigError("--num-experts is not given", "ScMoE needs experts", "2 or more")


@rule("--scmoe-tap", "--moe-layer-freq")
def tap_is_of_a_dense_block(scmoe: ScMoEConfig, settings: Settings) -> None:
    if _has_moe_in_every_block(settings) and scmoe.tap != "pos1":
        raise ScMoEConfigError(
            f"--scmoe-tap {scmoe.tap} with MoE in every block "
            f"(--moe-layer-freq {settings.moe_layer_freq})",
            "there is no preceding dense block to tap",
            f"--scmoe-tap pos1, or --moe-layer-freq '[0,1]*{max(settings.num_layers // 2, 1)}'",
        )


@rule("--scmoe-router-norm", "--moe-layer-freq")
def shared_norm_is_of_a_dense_block(scmoe: ScMoEConfig, settings: Settings) -> None:
    if _has_moe_in_every_block(settings) and scmoe.router_norm == "shared":
        raise ScMoEConfigError(
            "--scmoe-router-norm shared with MoE in every block "
            f"(--moe-layer-freq {settings.moe_layer_freq})",
            "there is no preceding dense MLP whose norm could be shared",
            "--scmoe-router-norm own",
        )


@rule("--num-layers")
def blocks_come_in_pairs(scmoe: ScMoEConfig, settings: Settings) -> None:
    layers = settings.num_layers
    if _has_dense_blocks(settings) and layers % 2:
        raise ScMoEConfigError(
            f"--num-layers {layers}",
            "blocks come in pairs of a dense and a MoE block",
            f"{layers - 1} or {layers + 1}",
        )


@rule("--moe-layer-freq")
def dense_and_moe_blocks_alternate(scmoe: ScMoEConfig, settings: Settings) -> None:
    if not _has_dense_blocks(settings):
        return
    pairs = settings.num_layers // 2
    if _pattern(settings) != [0, 1] * pairs:
        raise ScMoEConfigError(
            f"--moe-layer-freq {settings.moe_layer_freq}",
            "dense and MoE blocks must alternate, dense first",
            f"'[0,1]*{pairs}', or 1 for MoE in every block with --scmoe-tap pos1",
        )


@rule("--scmoe-combine", "--moe-shared-expert-intermediate-size")
def gates_weigh_a_shared_expert(scmoe: ScMoEConfig, settings: Settings) -> None:
    if scmoe.combine != "add" and settings.moe_shared_expert_intermediate_size is None:
        raise ScMoEConfigError(
            f"--scmoe-combine {scmoe.combine} without --moe-shared-expert-intermediate-size",
            "there is no shared expert to weigh",
            "--scmoe-combine add, or a shared expert",
        )


@rule("--moe-shared-expert-gate", "--scmoe-combine")
def megatrons_shared_expert_gate_is_cg1(scmoe: ScMoEConfig, settings: Settings) -> None:
    if settings.moe_shared_expert_gate and scmoe.combine != "cg1":
        raise ScMoEConfigError(
            f"--moe-shared-expert-gate with --scmoe-combine {scmoe.combine}",
            "the shared expert's gate is what CG-1 means",
            "--scmoe-combine cg1",
        )


@rule("--no-bias-gelu-fusion")
def experts_have_no_fused_gelu(scmoe: ScMoEConfig, settings: Settings) -> None:
    """Megatron's experts have no such kernel and fail in their first forward.

    Of a ``TransformerConfig`` alone; flags are mended in platform/megatron_workarounds.py.
    """
    is_gelu = settings.activation_func is torch.nn.functional.gelu
    if settings.bias_activation_fusion and is_gelu and not settings.gated_linear_unit:
        raise ScMoEConfigError(
            "experts with gelu and its fusion with the bias",
            "Megatron's experts have no such kernel",
            "--no-bias-gelu-fusion, or --swiglu",
        )


@rule("--use-grouped-gemm-for-shared-expert", "--disable-bias-linear")
def fused_shared_expert_has_no_biases(scmoe: ScMoEConfig, settings: Settings) -> None:
    if settings.add_bias_linear and settings.use_grouped_gemm_for_shared_expert:
        raise ScMoEConfigError(
            "--use-grouped-gemm-for-shared-expert without --disable-bias-linear",
            "the fused shared expert has no biases",
            "one of them",
        )


@rule("--apply-layernorm-1p", "--transformer-impl")
def local_norms_have_no_zero_centred_scale(scmoe: ScMoEConfig, settings: Settings) -> None:
    if settings.transformer_impl == "local" and settings.layernorm_zero_centered_gamma:
        raise ScMoEConfigError(
            "--apply-layernorm-1p with --transformer-impl local",
            "PyTorch's norms have no zero-centred scale",
            "--transformer-impl transformer_engine, or leave the flag out",
        )


def _pattern(settings: Settings) -> list[int] | None:
    """One 0 (dense) or 1 (MoE) per block; None where the settings do not say."""
    if settings.num_layers is None or settings.moe_layer_freq is None:
        return None
    return moe_pattern(settings.moe_layer_freq, settings.num_layers)


def _has_moe_in_every_block(settings: Settings) -> bool:
    pattern = _pattern(settings)
    return pattern is not None and all(pattern)


def _has_dense_blocks(settings: Settings) -> bool:
    pattern = _pattern(settings)
    return pattern is not None and not all(pattern)
