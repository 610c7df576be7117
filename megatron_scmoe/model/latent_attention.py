"""Multi-latent attention (MLA): Megatron's, with LongCat-Flash's norms and on the CPU.

    q = W_uq (s_q * norm(W_dq x)),   [k | v] = W_ukv (s_kv * norm(W_dkv x)),   s = sqrt(h / rank)

Both scales and the epsilon of both norms are LongCat-Flash's (``--scmoe-mla-scale``,
``--scmoe-mla-norm-epsilon``); without these flags it is Megatron's MLA.
"""

import functools
import math
from dataclasses import replace

from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.tensor_parallel import (
    gather_from_tensor_model_parallel_region,
    scatter_to_sequence_parallel_region,
)
from megatron.core.transformer.dot_product_attention import DotProductAttention
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import MLASelfAttention
from megatron.core.transformer.torch_norm import LayerNormBuilder
from megatron.core.transformer.transformer_config import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules
from torch import Tensor, nn

from megatron_scmoe.config import ScMoEConfig

_KEYS = {
    "self_attention.q_layernorm.": "self_attention.linear_q_up_proj.layer_norm_",
    "self_attention.kv_layernorm.": "self_attention.linear_kv_up_proj.layer_norm_",
}
_LOCAL_KEYS = {"pre_mlp_layernorm.": "mlp.linear_fc1.layer_norm_"}


def use_latent_attention(
    submodules: TransformerLayerSubmodules,
    config: MLATransformerConfig,
    scmoe: ScMoEConfig,
    norm: LayerNormBuilder,
) -> None:
    """Fit the spec of a block with Megatron's MLA to the configuration, in place.

    Norms that Transformer Engine would fuse into the up-projections stand alone where Megatron's local
    implementation runs or their scale or epsilon is not Megatron's. Checkpoint keys are
    Transformer Engine's all the same.
    """
    is_local = config.transformer_impl == "local"
    scaled = scmoe.mla_scale or scmoe.mla_norm_epsilon is not None
    attention = submodules.self_attention
    parts = attention.submodules
    keys = dict(submodules.sharded_state_dict_keys_map)
    if is_local or (config.qk_layernorm and (scaled or config.q_lora_rank is None)):
        attention = replace(attention, module=LatentSelfAttention)
    if is_local:
        parts = replace(parts, core_attention=LocalCoreAttention)
        keys |= _LOCAL_KEYS
    if config.qk_layernorm and (is_local or scaled):
        build = functools.partial(_latent_norm, norm=norm, scmoe=scmoe)
        parts = replace(
            parts,
            q_layernorm=IdentityOp if config.q_lora_rank is None else build,
            kv_layernorm=build,
        )
        if not is_local:
            linear = TESpecProvider().column_parallel_linear()
            parts = replace(parts, linear_q_up_proj=linear, linear_kv_up_proj=linear)
        keys |= _KEYS
    submodules.self_attention = replace(attention, submodules=parts)
    submodules.sharded_state_dict_keys_map = keys


class LatentSelfAttention(MLASelfAttention):
    """Megatron's MLA with norms and projections exactly as the spec lists them, and right under TP.

    With Transformer Engine Megatron would put a second norm before the projection of uncompressed
    queries (no ``--q-lora-rank``), which the local implementation has not.
    Where the down-projection is split over the tensor-parallel ranks, as in the local implementation,
    the rotary key's gradient would be that of one rank's heads only.
    """

    def _resolve_qk_norm_config(self, submodules) -> dict:
        names = "linear_q_proj linear_q_up_proj linear_kv_up_proj q_layernorm kv_layernorm"
        return {name: getattr(submodules, name) for name in names.split()}

    def _qkv_down_projection(self, hidden_states: Tensor) -> tuple[Tensor, Tensor]:
        """Megatron's, with latent and rotary key of keys and values whole on every rank.

        Left split, the rotary key would be gathered by a function whose backward splits and does not
        sum. Whole, it is gathered along the sequence, as Transformer Engine's is.

        Returns:
            The queries' latent (or ``hidden_states``), and latent with rotary key,
            [s / TP, b, kv_lora_rank + qk_pos_emb_head_dim] (s without sequence parallel).
        """
        q_compressed, kv_combined = super()._qkv_down_projection(hidden_states)
        if kv_combined.size(-1) != self.config.kv_lora_rank + self.config.qk_pos_emb_head_dim:
            kv_combined = gather_from_tensor_model_parallel_region(kv_combined)
            if self.config.sequence_parallel:  # generation has it switched off
                kv_combined = scatter_to_sequence_parallel_region(kv_combined)
        return q_compressed, kv_combined


class LocalCoreAttention(DotProductAttention):
    """Megatron's attention in plain PyTorch, with values of another size than keys.

    Args:
        k_channels: size of a query and key head; Megatron's MLA gives the scale it implies as well.
        v_channels: size of a value head; None for Megatron's own (its MLA builds one such first).
    """

    def __init__(
        self, *args, k_channels: int | None = None, v_channels: int | None = None, **kwargs
    ):
        super().__init__(*args, **kwargs)
        if v_channels is not None:
            self.hidden_size_per_partition = v_channels * self.num_attention_heads_per_partition


def _latent_norm(
    *, norm: LayerNormBuilder, scmoe: ScMoEConfig, config: TransformerConfig, hidden_size: int, eps
) -> nn.Module:
    """The norm of a latent of rank ``hidden_size``; a hook scales its output, keys stay a norm's."""
    built = norm(
        config=config,
        hidden_size=hidden_size,
        eps=eps if scmoe.mla_norm_epsilon is None else scmoe.mla_norm_epsilon,
    )
    if scmoe.mla_scale:
        built.register_forward_hook(
            functools.partial(_scale, factor=math.sqrt(config.hidden_size / hidden_size))
        )
    return built


def _scale(module: nn.Module, args: tuple, output: Tensor, *, factor: float) -> Tensor:
    return output * factor
