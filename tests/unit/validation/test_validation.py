"""Refusals: one line that names the flag, the value and what is accepted."""

import sys
from unittest.mock import patch

import pytest
import torch
from megatron.core.transformer.pipeline_parallel_layer_layout import PipelineParallelLayerLayout
from megatron.training.arguments import parse_args

from megatron_scmoe.arguments import (
    add_scmoe_args,
    scmoe_config_from_args,
    scmoe_config_from_environment,
)
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.validation.rules import validate
from tests import models

PLAIN = """--num-layers 8 --num-experts 4 --moe-layer-freq [0,1]*4 --moe-router-topk 2
    --moe-token-dispatcher-type alltoall --moe-shared-expert-intermediate-size 64
    --transformer-impl local""".split()


def judge(*flags: str) -> None:
    """Parse the flags as the entry point does and validate them."""
    with patch.object(sys, "argv", ["pretrain_gpt_scmoe.py", *PLAIN, *flags]):
        args = parse_args(add_scmoe_args)
    validate(scmoe_config_from_args(args), args)


GRAPHS = "--cuda-graph-impl transformer_engine --cuda-graph-modules attn moe_router moe_preprocess"
BIASED = "--moe-router-pre-softmax --scmoe-expert-bias proportional"
LATENT = "--multi-latent-attention --qk-layernorm"

REFUSED = [
    ("--num-experts 0", "--num-experts is not given", "2 or more"),
    ("--num-layers 7 --moe-layer-freq [0,1]*3+[0]", "--num-layers 7", "6 or 8"),
    ("--moe-layer-freq 2", "--moe-layer-freq 2", "'[0,1]*4'"),
    ("--moe-layer-freq [1,0]*4", "--moe-layer-freq [1, 0, ", "'[0,1]*4'"),
    ("--moe-layer-freq 1", "--scmoe-tap pos2 with MoE in every block", "--scmoe-tap pos1"),
    (
        "--moe-layer-freq 1 --scmoe-tap pos1 --scmoe-router-norm shared",
        "--scmoe-router-norm shared",
        "--scmoe-router-norm own",
    ),
    ("--scmoe-expert-slot 4", "--scmoe-expert-slot 4", "accepted: 3"),
    ("--scmoe-tap pos1 --scmoe-expert-slot 3", "--scmoe-expert-slot 3", "accepted: 2"),
    ("--scmoe-expert-slot -1", "--scmoe-expert-slot -1", "accepted: 0"),
    (
        "--scmoe-combine cg2 --moe-shared-expert-gate",
        "--moe-shared-expert-gate with --scmoe-combine cg2",
        "--scmoe-combine cg1",
    ),
    ("--scmoe-chunks 0", "--scmoe-chunks 0", "1 or more"),
    (
        "--scmoe-chunks 2 --moe-pad-expert-input-to-capacity --moe-expert-capacity-factor 2",
        "--scmoe-chunks 2 with --moe-pad-expert-input-to-capacity",
        "--scmoe-chunks 1",
    ),
    (
        "--scmoe-chunks 2 --moe-router-padding-for-quantization",
        "--scmoe-chunks 2 with --moe-router-padding-for-quantization",
        "--scmoe-chunks 1",
    ),
    (
        "--scmoe-expert-slot auto --no-scmoe-overlap",
        "--scmoe-expert-slot auto with --no-scmoe-overlap",
        "--scmoe-overlap",
    ),
    ("--scmoe-expert-slot auto --fp8-format hybrid", "--fp8-format hybrid", "0 to 3"),
    (
        "--scmoe-expert-slot auto --init-model-with-meta-device",
        "--init-model-with-meta-device",
        "0 to 3",
    ),
    (
        "--scmoe-operator-times times.json",
        "--scmoe-operator-times times.json without --scmoe-expert-slot auto",
        "--scmoe-expert-slot auto",
    ),
    ("--moe-router-topk 1", "--moe-router-topk 1", "--moe-router-pre-softmax"),
    ("--moe-router-topk 5", "--moe-router-topk 5", "accepted: 4"),
    (
        "--moe-token-dispatcher-type allgather",
        "--moe-token-dispatcher-type allgather",
        "--no-scmoe-overlap",
    ),
    (
        "--moe-token-dispatcher-type flex",
        "--moe-token-dispatcher-type flex",
        "--moe-token-dispatcher-type alltoall",
    ),
    ("--scmoe-exchange copy-peer", "--scmoe-exchange copy-peer", "accepted: collective"),
    (
        "--scmoe-exchange copy-host --no-scmoe-overlap --moe-token-dispatcher-type allgather",
        "--scmoe-exchange copy-host with --moe-token-dispatcher-type allgather",
        "--moe-token-dispatcher-type alltoall",
    ),
    (
        "--scmoe-copy-engine-all-to-alls dispatch combine-backward",
        "--scmoe-copy-engine-all-to-alls dispatch combine-backward with --scmoe-exchange collective",
        "--scmoe-exchange copy-peer or copy-host",
    ),
    ("--recompute-granularity selective --recompute-modules moe", "moe", "moe_act"),
    ("--moe-layer-recompute", "--moe-layer-recompute", "leave the flag out"),
    (
        "--moe-enable-deepep",
        "--moe-enable-deepep with --moe-token-dispatcher-type alltoall",
        "leave the flag out",
    ),
    ("--moe-use-upcycling", "scmoe convert upcycle makes", "leave the flag out"),
    (
        "--recompute-granularity full --recompute-method block --recompute-num-layers 2",
        "--recompute-method block",
        "--recompute-method uniform",
    ),
    (
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 3",
        "--recompute-num-layers 3",
        "2 or 4",
    ),
    ("--overlap-moe-expert-parallel-comm", "--overlap-moe-expert-parallel-comm", "--scmoe-overlap"),
    ("--moe-shared-expert-overlap", "--moe-shared-expert-overlap", "--scmoe-overlap"),
    ("--delay-wgrad-compute", "--delay-wgrad-compute", "leave the flag out"),
    ("--mtp-num-layers 1", "--mtp-num-layers 1", "leave the flag out"),
    ("--cuda-graph-impl local", "--cuda-graph-impl local", "--cuda-graph-modules attn"),
    ("--cuda-graph-impl transformer_engine", "--cuda-graph-modules (none", "accepted: attn"),
    (
        "--cuda-graph-impl transformer_engine --cuda-graph-modules attn mlp",
        "--cuda-graph-modules attn mlp",
        "accepted: attn",
    ),
    (
        f"{GRAPHS} --scmoe-tap pos3 --scmoe-expert-slot auto",
        "--scmoe-expert-slot auto with --cuda-graph-modules attn moe_router moe_preprocess with "
        "--scmoe-tap pos3",
        "accepted: a number; the second attention lies between tap and slot 3",
    ),
    (
        f"{GRAPHS.replace('attn', 'attn mlp')} --expert-model-parallel-size 2",
        "--scmoe-expert-slot 1 with --cuda-graph-modules attn mlp moe_router moe_preprocess with "
        "--scmoe-tap pos2",
        "accepted: --scmoe-expert-slot 2, or --cuda-graph-modules without mlp",
    ),
    (
        f"{GRAPHS} --scmoe-tap pos1",
        "--cuda-graph-modules moe_router with --scmoe-tap pos1",
        "accepted: attn",
    ),
    (f"{GRAPHS} --moe-latent-size 64", "moe_router with --moe-latent-size 64", "accepted: attn"),
    (
        f"{GRAPHS} --moe-router-load-balancing-type sinkhorn",
        "moe_router with --moe-router-load-balancing-type sinkhorn",
        "accepted: attn",
    ),
    (
        f"{GRAPHS} --moe-expert-capacity-factor 2",
        "moe_router with --moe-expert-capacity-factor 2.0",
        "accepted: attn",
    ),
    (
        f"{GRAPHS} --transformer-impl transformer_engine --bf16 --position-embedding-type yarn",
        "--cuda-graph-impl transformer_engine with --position-embedding-type yarn",
        "rope",
    ),
    (
        f"{GRAPHS} --transformer-impl transformer_engine --bf16 --fp32-residual-connection",
        "--cuda-graph-impl transformer_engine with --fp32-residual-connection",
        "--cuda-graph-impl none",
    ),
    (
        f"{GRAPHS} --transformer-impl transformer_engine --fp16",
        "--cuda-graph-impl transformer_engine without --bf16",
        "--bf16",
    ),
    (f"{GRAPHS} --scmoe-chunks 2", "moe_router with --scmoe-chunks 2", "accepted: attn"),
    (
        f"{GRAPHS} {BIASED}",
        "moe_router with --scmoe-expert-bias proportional",
        "accepted: attn",
    ),
    (f"{GRAPHS} --scmoe-router-norm shared", "with --scmoe-router-norm shared", "accepted: attn"),
    (
        "--cuda-graph-impl transformer_engine --cuda-graph-modules attn",
        "--cuda-graph-impl transformer_engine with --transformer-impl local",
        "--cuda-graph-impl none",
    ),
    ("--transformer-impl inference_optimized", "inference_optimized", "transformer_engine"),
    ("--mlp-chunks-for-training 2", "--mlp-chunks-for-training 2", "1"),
    ("--use-megatron-fsdp", "--use-megatron-fsdp", "--use-distributed-optimizer"),
    ("--use-torch-fsdp2", "--use-torch-fsdp2", "--use-distributed-optimizer"),
    (
        "--recompute-granularity selective --recompute-modules layernorm",
        "--recompute-modules layernorm",
        "core_attn",
    ),
    ("--context-parallel-size 2", "--context-parallel-size 2", "transformer_engine"),
    ("--apply-layernorm-1p", "--apply-layernorm-1p", "leave the flag out"),
    ("--scmoe-zero-experts -1", "--scmoe-zero-experts -1", "0 or more"),
    ("--scmoe-zero-experts 2 --moe-router-topk 7", "--moe-router-topk 7", "accepted: 6"),
    (
        "--scmoe-zero-experts 2 --moe-token-dispatcher-type flex",
        "--moe-token-dispatcher-type flex with --scmoe-zero-experts 2",
        "--moe-token-dispatcher-type alltoall",
    ),
    (
        "--scmoe-zero-experts 2 --moe-expert-capacity-factor 2",
        "--moe-expert-capacity-factor 2.0 with --scmoe-zero-experts 2",
        "leave the flag out",
    ),
    (
        "--scmoe-zero-experts 2 --moe-router-load-balancing-type sinkhorn",
        "--moe-router-load-balancing-type sinkhorn with --scmoe-zero-experts 2",
        "aux_loss",
    ),
    (
        "--scmoe-zero-experts 2 --moe-router-fusion",
        "--moe-router-fusion with --scmoe-zero-experts 2",
        "leave the flag out",
    ),
    (
        "--scmoe-zero-experts 2 --moe-router-num-groups 2 --moe-router-group-topk 1",
        "--moe-router-num-groups 2 with --scmoe-zero-experts 2",
        "leave the flag out",
    ),
    (
        f"{BIASED} --moe-enable-routing-replay",
        "--moe-enable-routing-replay with --scmoe-expert-bias",
        "leave the flag out",
    ),
    (
        "--scmoe-expert-bias proportional",
        "--scmoe-expert-bias proportional without",
        "--moe-router-enable-expert-bias",
    ),
    (
        f"{BIASED} --moe-router-score-function sigmoid",
        "without --moe-router-score-function softmax",
        "--moe-router-enable-expert-bias",
    ),
    (
        f"{BIASED} --moe-router-enable-expert-bias",
        "with --moe-router-enable-expert-bias",
        "--scmoe-expert-bias",
    ),
    ("--scmoe-active-experts 1", "--scmoe-active-experts 1", "--scmoe-expert-bias proportional"),
    (f"{BIASED} --scmoe-active-experts 3", "--scmoe-active-experts 3", "more than 0, up to 2"),
    (f"{BIASED} --scmoe-active-experts 0", "--scmoe-active-experts 0", "more than 0, up to 2"),
    (
        f"{BIASED} --scmoe-active-experts 1.5",
        "--scmoe-active-experts 1.5 without --scmoe-zero-experts",
        "2, or --scmoe-zero-experts",
    ),
    ("--scmoe-mla-scale", "--scmoe-mla-scale", "--multi-latent-attention"),
    ("--scmoe-mla-scale --multi-latent-attention", "without --qk-layernorm", "--qk-layernorm"),
    (
        f"{LATENT} --scmoe-mla-norm-epsilon 0",
        "--scmoe-mla-norm-epsilon 0",
        "1e-6",
    ),
    (
        f"{LATENT} --q-lora-rank 8 --mla-down-proj-fusion",
        "--mla-down-proj-fusion with",
        "leave the flag out",
    ),
    (
        f"{LATENT} --mla-down-proj-fusion",
        "--mla-down-proj-fusion without --q-lora-rank",
        "--q-lora-rank",
    ),
    (
        "--tensor-model-parallel-size 2",
        "--tensor-model-parallel-size 2 without --sequence-parallel",
        "--sequence-parallel",
    ),
    (f"{LATENT} --cache-mla-latents", "--cache-mla-latents", "leave the flag out"),
]


@pytest.mark.parametrize("flags,named,accepted", REFUSED, ids=[row[0] for row in REFUSED])
def test_refused_in_one_line(flags, named, accepted):
    with pytest.raises(ScMoEConfigError) as refusal:
        judge(*flags.split())
    message = str(refusal.value)
    given, _, nearest = message.rpartition("; accepted: ")
    assert named in given
    assert accepted.removeprefix("accepted: ") in nearest
    assert "\n" not in message


@pytest.mark.parametrize("combine", ["cg1", "cg2"])
def test_gates_need_a_shared_expert(combine):
    with pytest.raises(ScMoEConfigError, match=f"--scmoe-combine {combine} without"):
        validate(
            ScMoEConfig(combine=combine),
            models.transformer_config(moe_shared_expert_intermediate_size=None),
        )


@pytest.mark.parametrize(
    "flags",
    [
        "",
        "--scmoe-tap pos3 --scmoe-expert-slot 4",
        "--moe-layer-freq 1 --scmoe-tap pos1",
        "--num-layers 7 --moe-layer-freq 1 --scmoe-tap pos1",
        "--moe-token-dispatcher-type allgather --no-scmoe-overlap",
        "--moe-router-topk 1 --moe-router-pre-softmax",
        "--moe-router-topk 1 --moe-router-load-balancing-type sinkhorn",  # its weight is a sigmoid
        "--recompute-granularity full --recompute-method uniform --recompute-num-layers 4",
        # Pos-1 with its own norm reads nothing of the preceding block: pairs may be split.
        "--scmoe-tap pos1 --recompute-granularity full --recompute-method block "
        "--recompute-num-layers 1",
        "--scmoe-zero-experts 2 --moe-router-topk 6",
        f"{BIASED} --scmoe-zero-experts 4 --scmoe-active-experts 1.5",
        f"{BIASED} --scmoe-active-experts 2",
        "--scmoe-zero-experts 2 --moe-token-dispatcher-type allgather --no-scmoe-overlap",
        f"{LATENT} --scmoe-mla-scale --scmoe-mla-norm-epsilon 1e-6",
        "--tensor-model-parallel-size 2 --sequence-parallel",
    ],
)
def test_accepted(flags):
    judge(*flags.split())


PIPELINES = [
    (dict(pp=4), 12, "--pipeline-model-parallel-size 4", "accepted: 3"),
    (
        dict(pp=2, vpp=2),
        4,
        "--num-virtual-stages-per-pipeline-rank 2",
        "accepted: 1, which is --num-layers-per-virtual-pipeline-stage 2",
    ),
    (
        dict(pp=2, num_layers_in_first_pipeline_stage=3),
        8,
        "--decoder-first-pipeline-num-layers 3",
        "accepted: even numbers",
    ),
]


@pytest.mark.parametrize("layout,blocks,flag,accepted", PIPELINES)
def test_a_pipeline_that_splits_a_pair(layout, blocks, flag, accepted):
    config = models.transformer_config(num_layers=blocks, **layout)
    with pytest.raises(ScMoEConfigError) as refusal:
        validate(ScMoEConfig(), config)
    assert flag in str(refusal.value) and accepted in str(refusal.value)
    validate(ScMoEConfig(tap="pos1"), config)


def test_a_layout_that_splits_a_pair():
    layout = PipelineParallelLayerLayout("Ettt|tL", 2)
    config = models.transformer_config(pp=2, pipeline_model_parallel_layout=layout)
    with pytest.raises(ScMoEConfigError, match="--pipeline-model-parallel-layout"):
        validate(ScMoEConfig(), config)


@pytest.mark.parametrize("copied", [[], ["dispatch", "gather"]])
def test_copied_are_names_of_all_to_alls(copied):
    with pytest.raises(ScMoEConfigError, match="accepted: dispatch, combine, dispatch-backward"):
        validate(
            ScMoEConfig(exchange="copy-host", copy_engine_all_to_alls=copied),
            models.transformer_config(),
        )


def test_experts_have_no_fused_gelu():
    changes = dict(gated_linear_unit=False, activation_func=torch.nn.functional.gelu)
    config = models.transformer_config(add_bias_linear=True, **changes)
    validate(ScMoEConfig(), config)
    config.bias_activation_fusion = True
    with pytest.raises(ScMoEConfigError, match="accepted: --no-bias-gelu-fusion"):
        validate(ScMoEConfig(), config)


def test_a_fused_shared_expert_has_no_biases():
    config = models.transformer_config(add_bias_linear=True)
    config.use_grouped_gemm_for_shared_expert = True
    with pytest.raises(ScMoEConfigError, match="--use-grouped-gemm-for-shared-expert without"):
        validate(ScMoEConfig(), config)


def test_flags_are_generated_from_the_dataclass():
    with patch.object(sys, "argv", ["x", "--scmoe-tap", "pos3", "--no-scmoe-overlap"]):
        scmoe = scmoe_config_from_args(parse_args(add_scmoe_args))
    assert scmoe == ScMoEConfig(tap="pos3", overlap=False)


def test_one_hardware_queue_with_a_whole_block_captured(monkeypatch):
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    whole = GRAPHS.replace("attn", "attn mlp")
    with pytest.raises(ScMoEConfigError, match="MAX_CONNECTIONS=1: one hardware queue"):
        judge(*whole.split())
    for flags in (whole + " --no-scmoe-overlap", GRAPHS):  # these come to the next check
        with pytest.raises(ScMoEConfigError, match="with --transformer-impl local"):
            judge(*flags.split())


def test_environment_of_a_foreign_entry_point(monkeypatch, capsys):
    monkeypatch.setenv("SCMOE_ARGS", "--scmoe-tap pos1 --scmoe-expert-slot 2 --scmoe-post-norm")
    assert scmoe_config_from_environment() == ScMoEConfig(tap="pos1", expert_slot=2, post_norm=True)
    monkeypatch.setenv("SCMOE_ARGS", "--scmoe-tap pos4")
    with pytest.raises(SystemExit) as stop:
        scmoe_config_from_environment()
    assert stop.value.code == 2
    assert "invalid choice: 'pos4'" in capsys.readouterr().err
