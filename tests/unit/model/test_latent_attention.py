"""Which norms and projections the latent attention of Transformer Engine is built of."""

from types import SimpleNamespace

import pytest
from megatron.core.extensions.transformer_engine_spec_provider import TESpecProvider
from megatron.core.transformer.identity_op import IdentityOp
from megatron.core.transformer.multi_latent_attention import (
    MLASelfAttention,
    MLASelfAttentionSubmodules,
)
from megatron.core.transformer.spec_utils import ModuleSpec
from megatron.core.transformer.transformer_layer import TransformerLayerSubmodules

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.latent_attention import use_latent_attention
from megatron_scmoe.model.layer_spec import LocalNorm
from tests import models

TE = TESpecProvider()
PLAIN, WITH_NORM = TE.column_parallel_linear(), TE.column_parallel_layer_norm_linear()


@pytest.mark.parametrize("rank", [None, 12])
def test_uncompressed_queries_get_no_second_norm(rank):
    """The input's norm is theirs already; the local implementation has no other."""
    config = models.transformer_config(
        multi_latent_attention=True, qk_layernorm=True, q_lora_rank=rank, num_query_groups=None
    )
    config.transformer_impl = "transformer_engine"
    attention = MLASelfAttentionSubmodules(  # as Megatron's spec lists them
        linear_q_proj=PLAIN,
        linear_q_up_proj=WITH_NORM,
        linear_kv_up_proj=WITH_NORM,
        linear_proj=TE.row_parallel_linear(),
        q_layernorm=IdentityOp,
        kv_layernorm=IdentityOp,
    )
    layer = TransformerLayerSubmodules(
        self_attention=ModuleSpec(module=MLASelfAttention, submodules=attention)
    )
    use_latent_attention(layer, config, ScMoEConfig(), LocalNorm)
    chosen = layer.self_attention.module._resolve_qk_norm_config(
        SimpleNamespace(config=config), layer.self_attention.submodules
    )
    queries = "linear_q_proj" if rank is None else "linear_q_up_proj"
    assert chosen[queries] is (PLAIN if rank is None else WITH_NORM)
    assert chosen["linear_kv_up_proj"] is WITH_NORM
    assert chosen["q_layernorm"] is chosen["kv_layernorm"] is IdentityOp
