"""What is overridden in layers, router and dispatchers still has to be, and still fits.

A test that fails says that Megatron has changed there. Read its row in docs/megatron.md, then drop the
departure or fit it to the new Megatron.
"""

import ast

import pytest
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_layer_local_submodules
from megatron.core.transformer.moe.moe_layer import MoELayer
from megatron.core.transformer.torch_norm import WrappedTorchNorm

from tests import models
from tests.unit.megatron_ledger.source import definition, parameters, row, source

PARAMETERS = {
    "ArgumentGroupFactory._build_argparse_kwargs_from_field": "self attribute",
    "ArgumentGroupFactory._extract_type": "self config_type",
    "ArgumentGroupFactory._format_arg_name": "self config_attr_name prefix",
    "ChainedOptimizer.load_state_dict": "self state_dict",
    "ChainedOptimizer.sharded_state_dict": "self model_sharded_state_dict is_loading **kwargs",
    "DistributedOptimizer._set_main_param_and_optimizer_states": "self model_param tensors",
    "GraphableMegatronModule._te_cuda_graph_replay": "self *args **kwargs",
    "MLASelfAttention._qkv_down_projection": "self hidden_states",
    "MLASelfAttention._resolve_qk_norm_config": "self submodules",
    "MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize": "self point tokens_per_expert",
    "MoEAlltoAllTokenDispatcher._maybe_update_cuda_sync_point": "self point",
    "MoEAlltoAllTokenDispatcher.preprocess": "self routing_map",
    "MoEFlexTokenDispatcher.dispatch_postprocess": "self hidden_states probs",
    "MoELayer.forward": "self hidden_states intermediate_tensors padding_mask",
    "MoELayer.postprocess": "self output shared_expert_output",
    "MoELayer.preprocess": "self hidden_states probs routing_map",
    "MoELayer.route": "self hidden_states padding_mask",
    "MoELayer.routed_experts_compute": "self hidden_states probs",
    "MoELayer.shared_experts_compute": "self hidden_states",
    "OptimizerParamScheduler.load_state_dict": "self state_dict",
    "RouterReplay.get_replay_topk": "self scores topk num_groups group_topk default_compute_topk",
    "RowParallelLinear.forward": "self input_",
    "SharedExpertMLP.forward": "self hidden_states",
    "TopKRouter._maintain_float32_expert_bias": "self",
    "TransformerLayer._forward_mlp": (
        "self hidden_states inference_context padding_mask packed_seq_params"
    ),
    "TransformerLayer._forward_pre_mlp_layernorm": "self hidden_states",
    "TransformerLayer._get_submodules_under_cudagraphs": "self",
    "TransformerLayer._get_te_cuda_graph_replay_args": "self *args **kwargs",
    "TransformerLayer._maybe_unflatten_for_moe": (
        "self hidden_states padding_mask packed_seq_params"
    ),
    "TransformerLayer._te_cuda_graph_capture": "self *args **kwargs",
    "TransformerLayer._te_cuda_graph_replay": "self *args **kwargs",
    "TransformerLayer.get_layer_static_inputs": "self seq_length micro_batch_size",
    "megatron.training.training.update_train_iters": "args",
}
"""Parameters of what is overridden, replaced or called from within."""


@pytest.mark.parametrize("name", PARAMETERS)
def test_parameters_are_as_they_were(name):
    assert parameters(name) == PARAMETERS[name]


# Transformer layers.


@row("TransformerLayer._forward_attention")
def test_attention_and_mlp_are_two_calls():
    text = source("TransformerLayer.forward")
    assert text.index("self._forward_attention(") < text.index("self._forward_mlp(")


@row("TransformerLayer._forward_mlp")
def test_the_mlp_begins_with_its_norm():
    text = source("TransformerLayer._forward_mlp")
    assert "self._forward_pre_mlp_layernorm(hidden_states)" in text


@row("TransformerLayer._forward_pre_mlp_layernorm")
def test_the_norm_is_called_there():
    assert "self.pre_mlp_layernorm" in source("TransformerLayer._forward_pre_mlp_layernorm")


@row("TransformerLayer._maybe_unflatten_for_moe")
def test_it_gives_states_mask_and_size():
    text = source("TransformerLayer._maybe_unflatten_for_moe")
    assert "return (hidden_states, padding_mask, None)" in text


@row("TransformerLayer._te_cuda_graph_capture")
def test_the_router_is_captured_in_the_moe_block():
    text = source("TransformerLayer._te_cuda_graph_capture")
    assert "self.is_moe_layer" in text and "moe_router" in text


@row("TransformerLayer._te_cuda_graph_replay")
def test_a_replay_goes_on_in_megatrons_moe():
    assert "valid_cudagraph_attrs" in source("TransformerLayer._te_cuda_graph_replay_impl")


@row("GraphableMegatronModule._te_cuda_graph_replay")
def test_it_replays_one_graph():
    text = source("GraphableMegatronModule._te_cuda_graph_replay")
    assert "self.cuda_graphs[cg_index]" in text


@row("TransformerLayer._get_submodules_under_cudagraphs")
def test_the_router_is_among_them():
    text = source("TransformerLayer._get_submodules_under_cudagraphs")
    assert "self.mlp.router" in text


@row("TransformerLayer.parameters")
def test_a_graph_is_made_of_layers_alone():
    text = source("TECudaGraphHelper.create_cudagraphs")
    assert "make_graphed_callables(tuple(self.flattened_callables)" in text


@row("TransformerLayer.get_layer_static_inputs")
def test_a_mask_is_among_them():
    assert "attention_mask" in source("TransformerLayer.get_layer_static_inputs")


@row("TransformerLayer._get_te_cuda_graph_replay_args")
def test_a_mask_is_made_up():
    text = source("TransformerLayer._get_te_cuda_graph_replay_args")
    assert "get_zero_attention_mask" in text


# MoE layer and router.


@row("MoELayer.forward")
def test_forward_takes_all_steps():
    steps = ("shared_experts_compute", "route", "preprocess", "routed_experts_compute", "combine")
    text = source("MoELayer.forward")
    assert [step for step in steps if f"self.{step}(" not in text] == []


@row("MoELayer.token_dispatcher")
def test_dispatchers_are_built_by_their_type():
    text = source("MoELayer.__init__")
    assert "self.token_dispatcher = MoEAlltoAllTokenDispatcher(" in text


@row("MoELayer.route")
def test_route_gives_two_values():
    assert "probs, routing_map = " in source("MoELayer.route").replace("(", "").replace(")", "")


@row("SharedExpertMLP.forward")
def test_biases_are_refused():
    assert "bias is not supported in the shared experts" in source("SharedExpertMLP.__init__")


@row("RowParallelLinear.forward")
def test_the_mlp_adds_the_bias_in_place():
    assert "output += output_bias" in source("MLP.forward")


@row("TopKRouter._maintain_float32_expert_bias")
def test_counts_are_not_kept_in_fp32():
    text = source("TopKRouter._maintain_float32_expert_bias")
    assert "expert_bias" in text and "local_tokens_per_expert" not in text


@row("TopKRouter.router_replay")
def test_softmax_with_a_bias_is_refused_but_by_replay():
    biased = dict(moe_router_enable_expert_bias=True, moe_router_score_function="softmax")
    with pytest.raises(ValueError, match="Expert bias"):
        models.transformer_config(**biased)
    call = "router_replay.get_replay_topk(scores, topk, num_groups, group_topk, _compute_topk)"
    name = "megatron.core.transformer.moe.moe_utils.topk_routing_with_score_function"
    assert call in source(name)


@row("TransformerConfig.num_moe_experts")
def test_the_router_is_sized_by_it():
    assert "torch.empty((self.config.num_moe_experts, self.config.hidden_size)" in source(
        "Router.__init__"
    )


@row("TransformerConfig.finalize_model_grads_func")
def test_the_loop_keeps_what_is_set():
    assert "if config.finalize_model_grads_func is None" in source(
        "megatron.training.training.train"
    )


# Token dispatchers.


@row("MoEAlltoAllTokenDispatcher.dispatch_preprocess")
def test_a_padded_decode_is_of_the_first_model():
    assert "if moe_layer_cache is None" in source(
        "megatron.core.inference.utils.set_decode_expert_padding"
    )
    assert "self.capacity = get_capacity(" in source("MoEAlltoAllTokenDispatcher.preprocess")
    assert "drop_and_pad=self.drop_and_pad" in source(
        "MoEAlltoAllTokenDispatcher.dispatch_preprocess"
    )


@row("MoEAlltoAllTokenDispatcher.cuda_dtoh_point")
def test_sizes_are_copied_late_with_graphs():
    text = source("MoEAlltoAllTokenDispatcher.__init__")
    assert "self.cuda_dtoh_point = 'before_ep_alltoall'" in text


@row("MoEAlltoAllTokenDispatcher.preprocess")
def test_every_token_is_taken_to_have_topk_experts():
    text = source("MoEAlltoAllTokenDispatcher.preprocess")
    assert "self.num_out_tokens = routing_map.size(0) * self.config.moe_router_topk" in text


@row("MoEAlltoAllTokenDispatcher._maybe_update_cuda_sync_point")
def test_a_count_is_waited_for_before_the_permutation():
    text = source("MoEAlltoAllTokenDispatcher.preprocess")
    assert "self._maybe_update_cuda_sync_point('before_permutation_1')" in text


@row("MoEAlltoAllTokenDispatcher._maybe_dtoh_and_synchronize")
def test_sizes_are_waited_for_before_the_exchange():
    text = source("MoEAlltoAllTokenDispatcher.token_dispatch")
    assert "self._maybe_dtoh_and_synchronize('before_ep_alltoall'" in text


@row("MoEFlexTokenDispatcher._comm_manager")
def test_it_keeps_the_probabilities():
    assert "self._comm_manager.token_probs" in source("MoEFlexTokenDispatcher.dispatch_preprocess")
    assert "self._comm_manager.dispatched_probs" in source("MoEFlexTokenDispatcher.token_dispatch")


@row("MoEFlexTokenDispatcher.dispatch_postprocess")
def test_it_ignores_the_probabilities():
    body = definition("MoEFlexTokenDispatcher.dispatch_postprocess").body
    names = {node.id for part in body for node in ast.walk(part) if isinstance(node, ast.Name)}
    assert "hidden_states" in names and "probs" not in names


# Latent attention, and what the local implementation lacks.


@row("MLASelfAttention._resolve_qk_norm_config")
def test_norms_are_chosen_beside_the_spec():
    assert "QKNormConfigResolver" in source("MLASelfAttention._resolve_qk_norm_config")


@row("MLASelfAttention._qkv_down_projection")
def test_queries_alone_are_gathered():
    text = source("MLASelfAttention._qkv_down_projection")
    assert "gather_from_tensor_model_parallel_region(q_compressed)" in text
    assert "gather_from_tensor_model_parallel_region(kv_combined)" not in text


@row("DotProductAttention")
def test_values_have_no_size_of_their_own():
    assert "v_channels" not in parameters("DotProductAttention.__init__")


@row("WrappedTorchNorm")
def test_sequence_parallelism_is_refused():
    config = models.transformer_config()
    config.persist_layer_norm = False
    WrappedTorchNorm(config, 8)
    config.sequence_parallel = True
    with pytest.raises(AssertionError, match="sequence parallel"):
        WrappedTorchNorm(config, 8)


@row("TransformerLayerSubmodules.sharded_state_dict_keys_map")
def test_the_norm_of_a_moe_is_saved_as_fused():
    submodules = get_gpt_layer_local_submodules(num_experts=4)
    keys = submodules.sharded_state_dict_keys_map
    assert keys["pre_mlp_layernorm."] == "mlp.linear_fc1.layer_norm_"


@row("TransformerLayerSubmodules.mlp")
def test_the_mlp_says_whether_it_is_a_moe():
    mlp = get_gpt_layer_local_submodules(num_experts=4).mlp
    assert mlp.func is MoELayer and "submodules" in mlp.keywords
    assert get_gpt_layer_local_submodules().mlp.func is not MoELayer


# Key-value cache.


@row("Attention._adjust_key_value_for_inference")
def test_keys_are_cached_before_they_are_rotated():
    text = source("Attention._adjust_key_value_for_inference")
    written = "[sequence_start:sequence_end, batch_start:batch_end, ...] = "
    assert f"inference_key_memory{written}key" in text
    assert f"inference_value_memory{written}value" in text
    forward = source("Attention.forward")
    assert forward.index("_adjust_key_value_for_inference(") < forward.index(
        "apply_rotary_pos_emb("
    )
    assert "sequence_start = inference_context.sequence_len_offset" in text  # the host's
    assert "apply_module(self.core_attention)(" in forward


@row("FusedScaleMaskSoftmax.forward_torch_softmax")
def test_a_mask_that_is_given_is_taken():
    text = source("FusedScaleMaskSoftmax.forward_torch_softmax")
    assert "== AttnMaskType.causal and mask is None and (sq > 1)" in text
    assert "self.mask_func(input, mask) if mask is not None else input" in text
