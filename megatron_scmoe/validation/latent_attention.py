"""Rules of multi-latent attention."""

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.validation.rule import rule
from megatron_scmoe.validation.settings import Settings


@rule("--scmoe-mla-norm-epsilon")
def epsilon_is_positive(scmoe: ScMoEConfig, settings: Settings) -> None:
    if scmoe.mla_norm_epsilon is not None and scmoe.mla_norm_epsilon <= 0:
        raise ScMoEConfigError(
            f"--scmoe-mla-norm-epsilon {scmoe.mla_norm_epsilon}",
            "it is added to a variance",
            "1e-6, for example",
        )


@rule("--scmoe-mla-scale", "--scmoe-mla-norm-epsilon")
def there_are_latents(scmoe: ScMoEConfig, settings: Settings) -> None:
    own = _own_norms(scmoe)
    if own and not settings.multi_latent_attention:
        raise ScMoEConfigError(
            own, "there are no latents", "--multi-latent-attention, or leave the flag out"
        )


@rule("--scmoe-mla-scale", "--scmoe-mla-norm-epsilon", "--qk-layernorm")
def latents_have_norms(scmoe: ScMoEConfig, settings: Settings) -> None:
    own = _own_norms(scmoe)
    if own and not settings.qk_layernorm:
        raise ScMoEConfigError(
            f"{own} without --qk-layernorm", "the latents have no norms", "--qk-layernorm"
        )


@rule("--cache-mla-latents")
def latents_are_not_cached(scmoe: ScMoEConfig, settings: Settings) -> None:
    if settings.multi_latent_attention and settings.cache_mla_latents:
        raise ScMoEConfigError(
            "--cache-mla-latents", "it is for inference only", "leave the flag out"
        )


@rule("--mla-down-proj-fusion", "--q-lora-rank")
def two_down_projections_are_fused(scmoe: ScMoEConfig, settings: Settings) -> None:
    if _fuses_down_projections(settings) and settings.q_lora_rank is None:
        raise ScMoEConfigError(
            "--mla-down-proj-fusion without --q-lora-rank",
            "there is one down-projection, nothing to fuse it with",
            "--q-lora-rank, or leave the flag out",
        )


@rule(
    "--mla-down-proj-fusion", "--scmoe-mla-scale", "--scmoe-mla-norm-epsilon", "--transformer-impl"
)
def fused_down_projections_have_megatrons_norms(scmoe: ScMoEConfig, settings: Settings) -> None:
    own = _own_norms(scmoe)
    if _fuses_down_projections(settings) and (own or settings.transformer_impl == "local"):
        raise ScMoEConfigError(
            f"--mla-down-proj-fusion with {own or '--transformer-impl local'}",
            "the fused projections have Megatron's norms, in Transformer Engine",
            "leave the flag out",
        )


def _own_norms(scmoe: ScMoEConfig) -> str | None:
    """The flag that asks for other norms of the latents than Megatron's."""
    if scmoe.mla_norm_epsilon is not None:
        return f"--scmoe-mla-norm-epsilon {scmoe.mla_norm_epsilon}"
    return "--scmoe-mla-scale" if scmoe.mla_scale else None


def _fuses_down_projections(settings: Settings) -> bool:
    return bool(settings.multi_latent_attention and settings.mla_down_proj_fusion)
