"""Flags of speed: what is chosen, what stands, what is refused."""

import argparse
from functools import partial
from pathlib import Path

import pytest
import torch
from megatron.core.transformer.moe import moe_utils
from megatron.training.arguments import parse_args

from megatron_scmoe import arguments
from megatron_scmoe.platform import cpu_backend
from megatron_scmoe.platform.command_line import UsageError
from megatron_scmoe.platform.megatron_flags import add_run_args, prepare_parser
from megatron_scmoe.training import speed_choices
from megatron_scmoe.training.saved_run import SavedRun
from tests.golden.runs import PAIRS

MODEL = f"""
    {PAIRS} --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 --moe-ffn-hidden-size 48
    --moe-shared-expert-intermediate-size 48 --seq-length 32 --max-position-embeddings 32 --swiglu
    --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall
    --moe-aux-loss-coeff 1e-2 --moe-router-dtype fp32 --expert-model-parallel-size 2
    --micro-batch-size 2 --train-iters 100 --lr 1e-2 --mock-data --tokenizer-type NullTokenizer
    --vocab-size 128 --no-gradient-accumulation-fusion --no-masked-softmax-fusion --no-rope-fusion
"""
ON_CPU = f"{MODEL} --transformer-impl local --distributed-backend gloo"
ON_GPU = f"{MODEL} --transformer-impl transformer_engine --bf16"
FULL = ["attn", "mlp", "moe_router", "moe_preprocess"]
GRAPHS = {"cuda_graph_impl", "cuda_graph_modules", "te_rng_tracker", "scmoe_expert_slot"}


@pytest.fixture(autouse=True)
def _two_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "1")
    monkeypatch.delenv("CUDA_DEVICE_MAX_CONNECTIONS", raising=False)
    monkeypatch.delenv(speed_choices.CUTLASS, raising=False)


@pytest.fixture
def gpu(monkeypatch):
    """What the checks ask of a GPU, and of Transformer Engine."""
    monkeypatch.setattr(speed_choices, "is_on_gpu", lambda: True)
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device=None: (9, 0))
    for name in dir(moe_utils):
        if name.startswith("fused_") or name.startswith("te_"):
            monkeypatch.setattr(moe_utils, name, object())


def choose(words: str, saved: SavedRun | None = None) -> speed_choices.Chosen:
    """As a run of these flags does."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("sys.argv", ["pretrain_gpt_scmoe.py", *words.split()])
        args = parse_args(partial(prepare_parser, add_run_args))
        return speed_choices.choose(args, arguments.given_on_command_line(), saved)


def names(modules) -> list[str]:
    return [module.name for module in modules]


@pytest.mark.skipif(not cpu_backend.is_enabled(), reason="of the CPU")
def test_on_a_cpu_gradients_overlap_and_garbage_waits():
    chosen = choose(ON_CPU)
    assert chosen.values == {
        "overlap_grad_reduce": True,
        "manual_gc": True,
        "manual_gc_interval": 100,
    }
    assert not chosen.notes


def test_on_gpus_everything_is_chosen_that_is_accepted(gpu):
    chosen = choose(ON_GPU)
    values = chosen.values
    assert names(values.pop("cuda_graph_modules")) == FULL
    assert values == {
        "moe_grouped_gemm": True,
        "moe_permute_fusion": True,
        "moe_router_fusion": True,
        "cross_entropy_loss_fusion": True,
        "cross_entropy_fusion_impl": "native",
        "create_attention_mask_in_dataloader": False,
        "use_distributed_optimizer": True,
        "overlap_grad_reduce": True,
        "overlap_param_gather": True,
        "manual_gc": True,
        "manual_gc_interval": 100,
        "rerun_mode": "disabled",
        "cuda_graph_impl": "transformer_engine",
        "te_rng_tracker": True,
        "scmoe_expert_slot": 2,
    }
    block = speed_choices.describe(chosen).splitlines()
    assert "--scmoe-tune off" in block[0]
    for words in ("--moe-grouped-gemm", "--no-create-attention-mask-in-dataloader"):
        assert any(line.strip().startswith(words) for line in block)


def test_many_small_experts_of_a_rank_share_a_kernel(gpu, monkeypatch):
    assert choose(ON_GPU).environment == {}
    fine = choose(f"{ON_GPU} --num-experts 64")
    assert fine.environment[speed_choices.CUTLASS][0] == "1"
    assert any("NVTE_USE_CUTLASS_GROUPED_GEMM=1 " in line for line in
               speed_choices.describe(fine).splitlines())  # fmt: skip
    monkeypatch.setenv(speed_choices.CUTLASS, "0")
    assert choose(f"{ON_GPU} --num-experts 64").environment == {}


@pytest.mark.parametrize(
    ("words", "left_out"),
    [
        ("--manual-gc-interval 7", {"manual_gc", "manual_gc_interval"}),
        ("--overlap-grad-reduce", {"overlap_grad_reduce"}),
        ("--cuda-graph-impl none", GRAPHS),
        ("--scmoe-expert-slot 3", {"scmoe_expert_slot"}),
        ("--no-scmoe-overlap", {"scmoe_expert_slot"}),
        ("--reset-attention-mask", {"create_attention_mask_in_dataloader"}),
        ("--optimizer sgd", {"use_distributed_optimizer", "overlap_param_gather"}),
        ("--moe-expert-capacity-factor 1", {"moe_permute_fusion", "scmoe_expert_slot"}),
    ],
)
def test_what_is_given_stands_and_what_cannot_work_with_it_is_left_out(gpu, words, left_out):
    every = set(choose(ON_GPU).values)
    assert every - set(choose(f"{ON_GPU} {words}").values) == left_out


@pytest.mark.parametrize(
    ("words", "modules"),
    [
        ("--scmoe-expert-slot 0", ["attn", "moe_router", "moe_preprocess"]),
        ("--scmoe-tap pos1", ["attn"]),
        ("--scmoe-chunks 2", ["attn"]),
    ],
)
def test_the_fullest_set_of_graphs_that_is_accepted(gpu, words, modules):
    assert names(choose(f"{ON_GPU} {words}").values["cuda_graph_modules"]) == modules


@pytest.mark.parametrize(
    ("words", "reason"),
    [
        ("--fp32-residual-connection", "the residual would be rounded at every block"),
        (
            "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2",
            "full recompute is only supported with full iteration CUDA graph",
        ),
    ],
)
def test_refused_graphs_are_left_out_with_the_reason(gpu, words, reason):
    chosen = choose(f"{ON_GPU} {words}")
    assert "cuda_graph_impl" not in chosen.values
    (note,) = chosen.notes
    assert note.startswith("no CUDA graphs: ")
    assert reason in note


def test_one_hardware_queue_is_remarked_on(gpu, monkeypatch):
    monkeypatch.setattr(cpu_backend, "is_enabled", lambda: False)
    monkeypatch.setenv("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    (note,) = choose(ON_GPU).notes
    assert note.startswith("CUDA_DEVICE_MAX_CONNECTIONS=1 is set")


def test_off_leaves_all_out(gpu):
    chosen = choose(f"{ON_GPU} --scmoe-tune off")
    assert chosen.values == {}


@pytest.mark.parametrize("had", [{}, {"moe_router_fusion": True, "overlap_grad_reduce": True}])
def test_a_resumed_run_chooses_what_the_saved_one_had(gpu, had):
    """Beside what changes no bit."""
    defaults = arguments.defaults()
    saved = SavedRun(
        "--load x", Path("iter_0000005"), {"args": argparse.Namespace(**defaults | had)}, True
    )
    free = {"create_attention_mask_in_dataloader", "manual_gc", "manual_gc_interval", "rerun_mode"}
    assert set(choose(ON_GPU, saved).values) == free | set(had)
    assert set(choose(f"{ON_GPU} --finetune", saved).values) == set(choose(ON_GPU).values)


def test_a_misspelt_word_is_no_file():
    with pytest.raises(UsageError, match="'of': accepted are off, startup and a file"):
        choose(f"{ON_CPU} --scmoe-tune of")


def test_nothing_is_chosen_where_the_flags_given_are_refused():
    chosen = choose(f"{ON_CPU} --moe-router-topk 9")
    assert chosen.values == {}
