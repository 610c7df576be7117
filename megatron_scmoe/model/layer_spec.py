"""The layer spec: which block of the model is built of what.

``pretrain_gpt_scmoe.py`` and ``--spec megatron_scmoe.spec scmoe_spec`` both end here.
"""

import functools
from dataclasses import fields, replace

import torch
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.tensor_parallel import RowParallelLinear
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.moe.moe_layer import MoELayer, MoESubmodules
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.torch_norm import WrappedTorchNorm
from megatron.core.transformer.transformer_block import TransformerBlockSubmodules
from megatron.core.transformer.transformer_config import TransformerConfig

from megatron_scmoe.config import (
    DEFAULT_EXPERT_SLOT,
    ScMoEConfig,
    needs_dense_partner,
    wanted_slot,
)
from megatron_scmoe.model.biased_experts import BiasedExpertLinear, BiasedSharedExpert
from megatron_scmoe.model.latent_attention import use_latent_attention
from megatron_scmoe.model.moe_layer import ScMoELayer
from megatron_scmoe.model.router import (
    ScMoERouter,
    finalize_model_grads,
    move_biases_with,
    needs_own_router,
)
from megatron_scmoe.model.transformer_layer import ScMoEDenseLayer, ScMoETransformerLayer
from megatron_scmoe.overlap.async_all_to_all import can_launch_late
from megatron_scmoe.overlap.routed_path import RoutedPath
from megatron_scmoe.overlap.schedule import Schedule, build_schedule
from megatron_scmoe.validation.rules import validate


def describe(scmoe: ScMoEConfig) -> str:
    """Configuration and schedule, for the log."""
    schedule = resolve_schedule(scmoe)
    partner = "a pair of blocks" if needs_dense_partner(scmoe) else "each MoE block"
    return f"> {scmoe}\n> schedule of {partner}:\n{schedule}"


def build_block_spec(
    config: TransformerConfig,
    scmoe: ScMoEConfig,
    vp_stage: int | None = None,
    local_norm_keys: bool = False,
) -> TransformerBlockSubmodules:
    """The specs of the blocks of this pipeline stage. Build a new one for each model.

    Args:
        config: Megatron's settings of the model.
        scmoe: the configuration of ScMoE.
        vp_stage: virtual pipeline stage, if any.
        local_norm_keys: use the checkpoint key that Megatron's local implementation gives the norm
            of a MoE block, to load its checkpoints (see :func:`_moe_block`).

    Raises:
        ScMoEConfigError: if configuration and model do not go together.
    """
    validate(scmoe, config)
    if scmoe.expert_bias != "none":
        if config.finalize_model_grads_func is None:
            config.finalize_model_grads_func = finalize_model_grads  # Megatron's loop keeps it
        move_biases_with(config)
    use_te = config.transformer_impl == "transformer_engine"
    stock = get_gpt_decoder_block_spec(
        config,
        use_transformer_engine=use_te,
        normalization=config.normalization,
        qk_l2_norm=config.qk_l2_norm,
        vp_stage=vp_stage,
    )
    norm = LocalNorm if stock.layer_norm is WrappedTorchNorm else stock.layer_norm
    specs: list[ModuleSpec] = []
    path = None
    # From the last block to the first: a dense block needs the path of the MoE block behind it.
    for spec in reversed(stock.layer_specs):
        submodules = replace(spec.submodules)
        _use_local_norms(submodules)
        if config.multi_latent_attention:
            use_latent_attention(submodules, config, scmoe, norm)
        if _is_moe(spec):
            path = RoutedPath(resolve_schedule(scmoe))
            if config.moe_shared_expert_intermediate_size is None:
                submodules.pre_mlp_layernorm = IdentityOp  # its only reader is the shared expert
            specs.append(_moe_block(config, submodules, scmoe, path, norm, local_norm_keys))
        elif needs_dense_partner(scmoe):
            if path is None:
                raise TypeError("no block that Megatron builds is known as a MoE")
            specs.append(_dense_block(submodules, scmoe, path, norm, use_te))
        else:
            specs.append(ModuleSpec(module=spec.module, submodules=submodules))
    return TransformerBlockSubmodules(layer_specs=specs[::-1], layer_norm=norm)


def stage_spec(
    model_config, vp_stage: int | None = None, *, scmoe: ScMoEConfig, local_norm_keys: bool
) -> TransformerBlockSubmodules:
    """As :func:`build_block_spec`, called as Megatron's model builder calls for a stage's spec."""
    return build_block_spec(model_config.transformer, scmoe, vp_stage, local_norm_keys)


def resolve_schedule(scmoe: ScMoEConfig) -> Schedule:
    """The schedule that a configuration asks for; with slot auto the default, until it is tuned."""
    wanted = wanted_slot(scmoe)
    slot = DEFAULT_EXPERT_SLOT[scmoe.tap] if wanted == "auto" else wanted
    return build_schedule(scmoe.tap, slot, scmoe.overlap, can_launch_late(), scmoe.chunks)


class LocalNorm:
    """PyTorch's LayerNorm or RMSNorm, for the local implementation.

    Megatron's own wrapper (``WrappedTorchNorm``) refuses sequence parallelism, though all it needs
    is the mark which makes Megatron sum the gradients over the tensor-parallel ranks.
    """

    def __new__(  # type: ignore[misc]  # a spec of Megatron's names a class to build
        cls, config: TransformerConfig, hidden_size: int, eps: float = 1e-5
    ) -> torch.nn.Module:
        """Build the norm over the last dimension of [s, b, hidden_size]."""
        kinds = {"LayerNorm": torch.nn.LayerNorm, "RMSNorm": torch.nn.RMSNorm}
        norm = kinds[config.normalization](hidden_size, eps=eps, dtype=config.params_dtype)
        for parameter in norm.parameters():
            parameter.sequence_parallel = config.sequence_parallel
        return norm


def _is_moe(spec: ModuleSpec) -> bool:
    """Whether Megatron's layer spec builds a MoE layer; an MLP is a partial, in 0.19."""
    return spec.submodules.mlp.func is MoELayer


def _moe_block(
    config, submodules, scmoe: ScMoEConfig, path: RoutedPath, norm, local_norm_keys: bool
) -> ModuleSpec:
    """The MoE block's spec: Megatron's, with our MLP and with the keys of Transformer Engine.

    Megatron's local spec saves the norm of a MoE block as if it were fused into a dense MLP
    (``mlp.linear_fc1.layer_norm_weight``). Without that mapping, checkpoints of the local and of the
    Transformer Engine implementation have the same keys.
    """
    parts = submodules.mlp.keywords["submodules"]
    if needs_own_router(scmoe):
        parts = replace(parts, router=functools.partial(ScMoERouter, scmoe=scmoe))
    if config.add_bias_linear:
        parts = _with_biases(parts)
    if scmoe.combine == "cg1":
        parts = replace(parts, shared_experts=functools.partial(_with_gate, parts.shared_experts))
    submodules.mlp = functools.partial(
        ScMoELayer, submodules=parts, scmoe=scmoe, path=path, norm=norm
    )
    if not local_norm_keys:
        keys_map = dict(submodules.sharded_state_dict_keys_map)
        keys_map.pop("pre_mlp_layernorm.", None)
        submodules.sharded_state_dict_keys_map = keys_map
    return ModuleSpec(
        module=ScMoETransformerLayer,
        params={"path": path, "taps_own_input": not needs_dense_partner(scmoe)},
        submodules=submodules,
    )


def _with_biases(parts: MoESubmodules) -> MoESubmodules:
    """Replace what of Megatron's experts cannot have biases."""
    shared = functools.partial(BiasedSharedExpert, **parts.shared_experts.keywords)
    linears = parts.experts.keywords["submodules"]
    if linears.linear_fc2 is RowParallelLinear:
        linears = replace(linears, linear_fc2=BiasedExpertLinear)
    experts = functools.partial(parts.experts.func, submodules=linears)
    return replace(parts, shared_experts=shared, experts=experts)


def _with_gate(build_shared_experts, *, gate: bool, **kwargs):
    """Build the shared expert with its sigmoid gate, which is CG-1, whatever Megatron's flag says."""
    return build_shared_experts(gate=True, **kwargs)


def _dense_block(submodules, scmoe: ScMoEConfig, path: RoutedPath, norm, use_te) -> ModuleSpec:
    """The dense block's spec: Megatron's; with a shared router norm, that norm is not fused."""
    if scmoe.router_norm == "shared" and use_te:
        mlp = submodules.mlp.keywords["submodules"]
        submodules.mlp = functools.partial(
            submodules.mlp.func,
            submodules=replace(mlp, linear_fc1=TESpecProvider().column_parallel_linear()),
        )
        submodules.pre_mlp_layernorm = norm
        submodules.sharded_state_dict_keys_map = {
            **submodules.sharded_state_dict_keys_map,
            "pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_",
        }
    return ModuleSpec(
        module=ScMoEDenseLayer, params={"scmoe": scmoe, "path": path}, submodules=submodules
    )


def _use_local_norms(submodules) -> None:
    """Replace Megatron's wrapper of PyTorch's norms wherever the local spec uses it."""
    for name in ("input_layernorm", "pre_mlp_layernorm"):
        if getattr(submodules, name) is WrappedTorchNorm:
            setattr(submodules, name, LocalNorm)
    attention = submodules.self_attention
    inner = {
        field.name: LocalNorm
        for field in fields(attention.submodules)
        if getattr(attention.submodules, field.name) is WrappedTorchNorm
    }
    submodules.self_attention = replace(
        attention, submodules=replace(attention.submodules, **inner)
    )
