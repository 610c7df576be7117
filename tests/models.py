"""Small ScMoE GPTs on any layout of ranks, built from Megatron's parts without its training loop."""

import torch
from megatron.core import parallel_state, tensor_parallel
from megatron.core.distributed import finalize_model_grads
from megatron.core.models.gpt import GPTModel
from megatron.core.models.gpt.gpt_layer_specs import get_gpt_decoder_block_spec
from megatron.core.pipeline_parallel import get_forward_backward_func
from megatron.core.transformer import MLATransformerConfig, TransformerConfig
from megatron.core.transformer.moe.router import MoEAuxLossAutoScaler

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.layer_spec import build_block_spec

VOCAB = 64
SEQUENCE = 16
MICRO_BATCH = 2

LAYOUTS = {
    "1 rank": dict(world_size=1),
    "EP2": dict(world_size=2, ep=2),
    "TP2+SP": dict(world_size=2, tp=2),
    "PP2": dict(world_size=2, pp=2),
    "EP2xPP2": dict(world_size=4, ep=2, pp=2),
    "EP2xTP2": dict(world_size=4, ep=2, tp=2),
    "EP2xETP2": dict(world_size=4, ep=2, tp=2, etp=2),
}
"""The layouts that tests compare, by the name the documentation uses."""

VIRTUAL = dict(world_size=2, pp=2, vpp=2)
"""Needs eight blocks: four virtual stages of one pair each."""


def init_parallel(world_size=1, tp=1, ep=1, etp=1, pp=1, vpp=None, seed=1) -> None:
    """Initialise Megatron's process groups (once: each holds threads for good) and random states.

    A tool that this process has called before may have done so.
    """
    if not parallel_state.model_parallel_is_initialized():
        parallel_state.initialize_model_parallel(
            tensor_model_parallel_size=tp,
            pipeline_model_parallel_size=pp,
            virtual_pipeline_model_parallel_size=vpp,
            expert_model_parallel_size=ep,
            expert_tensor_parallel_size=etp,
        )
    sizes = ("tensor_model", "expert_model", "expert_tensor", "pipeline_model")
    found = tuple(getattr(parallel_state, f"get_{size}_parallel_world_size")() for size in sizes)
    assert (tp, ep, etp, pp) == found, f"these ranks have the layout {found}"
    assert vpp == parallel_state.get_virtual_pipeline_model_parallel_world_size()
    torch.manual_seed(seed + 100 * parallel_state.get_pipeline_model_parallel_rank())
    tensor_parallel.model_parallel_cuda_manual_seed(seed, force_reset_rng=True)
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1).cuda())


def transformer_config(tp=1, ep=1, etp=1, pp=1, vpp=None, world_size=1, **changes):
    """A ``TransformerConfig`` of four blocks, hidden size 32; ``changes`` override its fields."""
    fields = dict(
        num_layers=4,
        hidden_size=32,
        num_attention_heads=4,
        num_query_groups=2,
        ffn_hidden_size=48,
        gated_linear_unit=True,
        activation_func=torch.nn.functional.silu,
        add_bias_linear=False,
        normalization="RMSNorm",
        hidden_dropout=0.0,
        attention_dropout=0.0,
        num_moe_experts=4,
        moe_ffn_hidden_size=40,
        moe_shared_expert_intermediate_size=40,
        moe_router_topk=2,
        moe_router_pre_softmax=True,
        moe_router_load_balancing_type="aux_loss",
        moe_aux_loss_coeff=0.01,
        moe_token_dispatcher_type="alltoall",
        transformer_impl="local",
        tensor_model_parallel_size=tp,
        sequence_parallel=tp > 1,
        expert_model_parallel_size=ep,
        expert_tensor_parallel_size=etp,
        pipeline_model_parallel_size=pp,
        virtual_pipeline_model_parallel_size=vpp,
        pipeline_dtype=torch.float32,
        gradient_accumulation_fusion=False,
        masked_softmax_fusion=False,
        bias_dropout_fusion=False,
        bias_activation_fusion=False,
        deallocate_pipeline_outputs=True,
        use_cpu_initialization=False,
        calculate_per_token_loss=False,
    )
    if vpp:  # two stages exchange activations and gradients with one peer: not in one batch
        fields |= dict(overlap_p2p_comm=True, batch_p2p_comm=False)
    fields["moe_layer_freq"] = [0, 1] * (changes.get("num_layers", 4) // 2)
    kind = MLATransformerConfig if changes.get("multi_latent_attention") else TransformerConfig
    return kind(**(fields | changes))


def build_chunks(
    config, scmoe: ScMoEConfig | None, local_norm_keys=False, tied: bool = False
) -> list:
    """This rank's model chunks (one without virtual stages); stock Megatron if ``scmoe`` is None."""
    pp, vpp = config.pipeline_model_parallel_size, config.virtual_pipeline_model_parallel_size
    rank = parallel_state.get_pipeline_model_parallel_rank()
    chunks = []
    for vp_stage in range(vpp or 1):
        stage = vp_stage if vpp else None
        if vpp:
            parallel_state.set_virtual_pipeline_model_parallel_rank(vp_stage)
        if scmoe is None:
            spec = get_gpt_decoder_block_spec(
                config,
                use_transformer_engine=config.transformer_impl == "transformer_engine",
                normalization=config.normalization,
                vp_stage=stage,
            )
        else:
            spec = build_block_spec(config, scmoe, stage, local_norm_keys)
        chunk = GPTModel(
            config,
            spec,
            vocab_size=VOCAB,
            max_sequence_length=SEQUENCE,
            pre_process=rank == 0 and vp_stage == 0,
            post_process=rank == pp - 1 and vp_stage == (vpp or 1) - 1,
            position_embedding_type="rope",
            share_embeddings_and_output_weights=tied,
            vp_stage=stage,
        )
        chunks.append(chunk.cuda())
    return chunks


def build_scmoe(
    scmoe: ScMoEConfig, layout: dict | None = None, tied: bool = False, **changes
) -> list:
    """Process groups and model chunks of a ScMoE GPT on ``layout``."""
    layout = layout or {}
    init_parallel(**layout)
    return build_chunks(transformer_config(**layout, **changes), scmoe, tied=tied)


def checkpoint_metadata() -> dict:
    """What Megatron's loop tells ``sharded_state_dict`` about the checkpoint."""
    return {
        "dp_cp_group": parallel_state.get_data_parallel_group(with_context_parallel=True),
        "non_homogeneous_layers": True,
    }


def batch(index: int, size: int = MICRO_BATCH):
    """Micro-batch ``index``: tokens and labels, [size, SEQUENCE] each; the same on every rank.

    Each row counts up in steps of one to three from a random start, so that there is something
    to learn.
    """
    generator = torch.Generator().manual_seed(1000 + index)
    start = torch.randint(0, VOCAB, (size, 1), generator=generator)
    stride = torch.randint(1, 4, (size, 1), generator=generator)
    tokens = (start + stride * torch.arange(SEQUENCE + 1)) % VOCAB
    return tokens[:, :-1].contiguous().cuda(), tokens[:, 1:].contiguous().cuda()


def positions(tokens):
    """Position ids of ``tokens``, [b, s]."""
    return torch.arange(tokens.shape[1], device=tokens.device).expand_as(tokens)


def forward(model, tokens, labels=None):
    """Token losses [b, s], or logits [b, s, v] without labels, of a model on one pipeline stage."""
    return model(tokens, positions(tokens), None, labels=labels)


def loss_and_gradients(model, tokens, labels):
    """Mean loss and gradients by name after one forward and backward."""
    for parameter in model.parameters():
        parameter.grad = None
    loss = forward(model, tokens, labels).float().mean()
    loss.backward()
    gradients = {n: p.grad.clone() for n, p in model.named_parameters() if p.grad is not None}
    return loss.detach(), gradients


def run_micro_batches(chunks, first: int, count: int) -> float:
    """Mean loss of ``count`` micro-batches of this data-parallel rank through Megatron's schedule.

    The chunks are wrapped in Megatron's DDP; gradients are accumulated and reduced there.
    """
    dp, dp_rank = (
        parallel_state.get_data_parallel_world_size(),
        parallel_state.get_data_parallel_rank(),
    )
    indices = [iter(range(first + dp_rank, first + count, dp)) for _ in chunks]

    def step(iterator, model):
        tokens, labels = batch(next(iterator))
        output = forward(model, tokens, labels)

        def mean(output):
            loss = output.float().mean()
            return loss, {"loss": loss.detach().clone()}  # the schedule scales loss in place

        return output, mean

    config = chunks[0].config
    if config.finalize_model_grads_func is None:  # as Megatron's loop does
        config.finalize_model_grads_func = finalize_model_grads
    losses = get_forward_backward_func()(
        forward_step_func=step,
        data_iterator=indices if len(chunks) > 1 else indices[0],
        model=chunks if len(chunks) > 1 else chunks[0],
        num_microbatches=count // dp,
        seq_length=SEQUENCE,
        micro_batch_size=MICRO_BATCH,
        forward_only=False,
    )
    total = torch.tensor([sum(float(loss["loss"]) for loss in losses), float(len(losses))])
    torch.distributed.all_reduce(total)
    return (total[0] / total[1]).item()
