"""The systems that benchmarks compare, and how each is built: stock Megatron-Core's, and ScMoE's.

Which there are, and of what shapes, is in shapes.py.
"""

from argparse import Namespace
from dataclasses import replace
from typing import ClassVar

import torch
from machine import ON_CPU  # maps CUDA to the CPU where there is no GPU: before Megatron
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.transformer import TransformerConfig
from megatron.core.transformer.cuda_graphs import TECudaGraphHelper
from megatron.training.training import num_floating_point_operations
from shapes import SCMOE, STOCK, Shape

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.layer_spec import build_block_spec, resolve_schedule
from megatron_scmoe.model.moe_layer import ScMoELayer
from megatron_scmoe.overlap.async_all_to_all import AllToAll
from megatron_scmoe.overlap.exchanges import exchange_for


def build_all(systems: list[str], shape: Shape, scmoe: ScMoEConfig) -> dict[str, GPTModel]:
    """Models by system."""
    models = {}
    for system in systems:
        built = next((models[other] for other in SCMOE if other in models), None)
        models[system] = built if built and system in SCMOE else build(system, shape, scmoe)
    return models


def switch(system: str, model: GPTModel, scmoe: ScMoEConfig) -> None:
    """Make the ScMoE model serial, overlapped, or overlapped without collectives (floor)."""
    if system not in SCMOE:
        return
    schedule = resolve_schedule(replace(scmoe, overlap=system != "scmoe-serial"))
    for module in model.modules():
        if isinstance(module, ScMoELayer):
            module.path.schedule = schedule
            for dispatcher in module.token_dispatchers:
                own = exchange_for(dispatcher.ep_group, scmoe)
                dispatcher.exchange = NoExchange if system == "floor" else own


def capture(models: dict[str, GPTModel], shape: Shape) -> list[TECudaGraphHelper]:
    """Capture the CUDA graphs of every model that has some."""
    captures = [
        GraphCapture([model], model.config, shape.sequence, shape.micro_batch)
        for model in {id(model): model for model in models.values()}.values()
        if model.config.cuda_graph_impl == "transformer_engine"
    ]
    for helper in captures:
        helper.create_cudagraphs()
    return captures


def flops(system: str, shape: Shape) -> float:
    """Floating-point operations of one micro-batch, forward and backward, as Megatron counts."""
    config = transformer_config(system, shape)
    settings = _Settings(
        **{name: getattr(config, name) for name in ("num_layers", "hidden_size", "kv_channels")},
        num_attention_heads=shape.heads,
        num_query_groups=config.num_query_groups,
        group_query_attention=True,
        ffn_hidden_size=shape.ffn,
        moe_ffn_hidden_size=shape.expert_ffn,
        moe_shared_expert_intermediate_size=config.moe_shared_expert_intermediate_size,
        moe_router_topk=config.moe_router_topk,
        moe_layer_freq=config.moe_layer_freq,
        num_experts=shape.experts,
        seq_length=shape.sequence,
        padded_vocab_size=shape.vocab,
        swiglu=True,
    )
    return num_floating_point_operations(settings, shape.micro_batch)


def build(system: str, shape: Shape, scmoe: ScMoEConfig) -> GPTModel:
    """One system's model on this rank; those of ``SCMOE`` are one model (see :func:`switch`)."""
    config = transformer_config(system, shape)
    if system in SCMOE:
        spec = build_block_spec(config, scmoe)
    else:
        spec = get_gpt_decoder_block_spec(config, not ON_CPU, normalization="RMSNorm")
    model = GPTModel(
        config, spec, shape.vocab, shape.sequence, position_embedding_type="rope"
    ).cuda()
    return model if ON_CPU else model.bfloat16()


def transformer_config(system: str, shape: Shape) -> TransformerConfig:
    """The settings of one system's model; those of speed are the same for all."""
    te = not ON_CPU
    dtype = torch.bfloat16 if te else torch.float32
    shared = system not in ("top2", "top1", "top2-1f1b")
    return TransformerConfig(
        num_layers=shape.blocks,
        hidden_size=shape.hidden,
        num_attention_heads=shape.heads,
        num_query_groups=shape.query_groups or shape.heads,
        ffn_hidden_size=shape.ffn,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        bias_activation_fusion=te,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=shape.experts,
        moe_ffn_hidden_size=shape.expert_ffn,
        moe_layer_freq=1 if shape.every_block else [0, 1] * (shape.blocks // 2),
        moe_shared_expert_intermediate_size=shape.topk * shape.expert_ffn if shared else None,
        moe_shared_expert_overlap=system == "shared-overlap",
        overlap_moe_expert_parallel_comm=system == "top2-1f1b",
        moe_router_topk=2 * shape.topk if system.startswith("top2") else shape.topk,
        moe_router_pre_softmax=True,
        moe_router_fusion=shape.router_fusion,
        moe_router_force_load_balancing=True,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_token_dispatcher_type="alltoall",
        moe_grouped_gemm=te,
        moe_permute_fusion=te,
        apply_rope_fusion=te,
        bias_dropout_fusion=te,
        cross_entropy_loss_fusion=te,
        cross_entropy_fusion_impl="native",
        transformer_impl="transformer_engine" if te else "local",
        bf16=te,
        params_dtype=dtype,
        pipeline_dtype=dtype,
        masked_softmax_fusion=False,
        gradient_accumulation_fusion=False,
        expert_model_parallel_size=torch.distributed.get_world_size(),
        **graph_settings(system, shape),
    )


def graph_settings(system: str, shape: Shape) -> dict:
    """What of the blocks each system captures: of stock all it can."""
    if not shape.cuda_graphs or system == "top2-1f1b":
        return {"cuda_graph_modules": []}  # Megatron warns of its own default
    modules = list(shape.cuda_graphs)
    if system in STOCK:
        modules = ["attn", *(["mlp"] if not shape.every_block else []), "moe_router"]
        # In capture's warm-up Megatron's overlapped shared expert refuses to begin twice.
        if system != "shared-overlap":
            modules.append("moe_preprocess")
    return {"cuda_graph_impl": "transformer_engine", "cuda_graph_modules": modules}


class GraphCapture(TECudaGraphHelper):
    """Megatron's capture for a model that no optimizer or data-parallel wrapper holds."""

    def _reset_after_capture(self):
        for parameter in self.model[0].parameters():
            parameter.grad = None


class NoExchange(AllToAll):
    """An exchange of nothing: what arrives is a buffer of the right length, filled once for all.

    Filled with rows of what was to be sent, as the time of a GEMM depends on its values: on the power
    that it draws, and so on the GPU's clock.
    """

    _buffers: ClassVar[dict[tuple, torch.Tensor]] = {}

    def _start(self, name, tensors, output_splits, input_splits):
        return [
            self._buffer(
                name, tensor, tensor.shape[0] if output_splits is None else sum(output_splits)
            )
            for tensor in tensors
        ]

    def _finish(self):
        return tuple(self._outputs)

    def _buffer(self, name: str, like: torch.Tensor, rows: int) -> torch.Tensor:
        key = (name, like.dtype, like.shape[1:])
        if key not in self._buffers or self._buffers[key].shape[0] < rows:
            picked = torch.randint(like.shape[0], (rows + rows // 8,), device=like.device)
            self._buffers[key] = like.detach()[picked]
            torch.cuda.synchronize()  # no wait follows
        return self._buffers[key][:rows]


class _Settings(Namespace):
    """Megatron's FLOP count reads many arguments; those of other models are None."""

    def __getattr__(self, name):
        return None
