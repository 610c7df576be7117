"""Saved arguments with the settings of the run set anew: one rank, the kernels that are here."""

import argparse
from dataclasses import fields

from megatron.core.extensions.transformer_engine import HAVE_TE

from megatron_scmoe.config import RUNTIME_FIELDS, ScMoEConfig
from megatron_scmoe.platform import megatron_workarounds


def settings_of_the_model(saved: argparse.Namespace, with_te: bool = HAVE_TE) -> argparse.Namespace:
    """A copy of saved arguments: the model as saved, the run that of one rank and of the kernels here.

    What computes the same without Transformer Engine is computed without it, where there is none or it
    is not to be used.
    """
    args = argparse.Namespace(**vars(saved))
    vars(args).update(_OF_ONE_RANK)
    if not with_te:
        vars(args).update(_WITHOUT_TE)
    megatron_workarounds.leave_out_missing_fusions(args)
    return args


_OF_ONE_RANK = dict(
    tensor_model_parallel_size=1,
    tensor_parallel_num_weight_shards=None,
    sequence_parallel=False,
    expert_model_parallel_size=1,
    expert_tensor_parallel_size=1,
    expert_tensor_parallel_num_weight_shards=None,
    gtp_weight_remat_size=1,
    expert_gtp_weight_remat_size=1,
    pipeline_model_parallel_size=1,
    virtual_pipeline_model_parallel_size=None,
    pipeline_model_parallel_layout=None,
    decoder_first_pipeline_num_layers=None,
    decoder_last_pipeline_num_layers=None,
    account_for_embedding_in_pipeline_split=False,
    account_for_loss_in_pipeline_split=False,
    context_parallel_size=1,
    hierarchical_context_parallel_sizes=None,
    overlap_p2p_comm=False,
    tp_comm_overlap=False,
    recompute_granularity=None,
    recompute_method=None,
    recompute_num_layers=None,
    recompute_modules=None,
    moe_layer_recompute=False,
    cpu_offloading=False,
    fine_grained_activation_offloading=False,
    moe_paged_stash=False,
    cuda_graph_impl="none",
    gradient_accumulation_fusion=False,  # it needs the buffers of a training run
    batch_invariant_mode=False,
    fp8=None,
    fp8_param_gather=False,
    fp8_output_proj=False,
    fp4=None,
    fp4_param_gather=False,
    moe_router_padding_for_fp8=False,
    moe_router_padding_for_quantization=False,
    moe_token_dispatcher_type="alltoall",
    moe_router_force_load_balancing=False,
    moe_shared_expert_overlap=False,
    overlap_moe_expert_parallel_comm=False,
    overlap_dispatch_backward_with_experts_wgrad=False,
    ep_overlap_early_attn_memory_release=False,
    delay_wgrad_compute=False,
    perform_initialization=False,
    no_persist_layer_norm=True,
    **{f"scmoe_{f.name}": f.default for f in fields(ScMoEConfig) if f.name in RUNTIME_FIELDS},
)
"""Settings of the run that saved the checkpoint, as this one has them; no result changes but by
rounding, finer than with fp8 and fp4."""

_WITHOUT_TE = dict(transformer_impl="local", moe_permute_fusion=False, moe_router_fusion=False)
