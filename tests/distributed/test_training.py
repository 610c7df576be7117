"""The pretraining script itself: resume, precisions, optimizers."""

import gzip
import re
from pathlib import Path

import pytest
import torch

from tests.harness import Run, run_pretrain

TINY = """
    --transformer-impl local --distributed-backend gloo --num-layers 2 --moe-layer-freq [0,1]*1
    --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48 --moe-ffn-hidden-size 48
    --moe-shared-expert-intermediate-size 48 --seq-length 32 --max-position-embeddings 32
    --swiglu --disable-bias-linear --normalization RMSNorm --position-embedding-type rope
    --num-experts 4 --moe-router-topk 2 --moe-token-dispatcher-type alltoall
    --moe-aux-loss-coeff 1e-2 --expert-model-parallel-size 2 --micro-batch-size 2
    --global-batch-size 8 --lr 1e-2 --lr-warmup-iters 2 --lr-decay-iters 10 --log-interval 1
    --eval-iters 0 --eval-interval 100 --mock-data --tokenizer-type NullTokenizer
    --vocab-size 128 --untie-embeddings-and-output-weights --num-workers 0
    --distributed-timeout-minutes 2
""".split()
DROPOUT = ["--attention-dropout", "0.1", "--hidden-dropout", "0.1"]
NO_DROPOUT = ["--attention-dropout", "0", "--hidden-dropout", "0"]
DISTRIBUTED = ["--use-distributed-optimizer", "--overlap-grad-reduce", "--overlap-param-gather"]


def train(*flags: str, iterations: int = 10) -> Run:
    run = run_pretrain([*TINY, "--train-iters", str(iterations), *flags], 2)
    assert run.status == 0, run.output[-3000:]
    return run


@pytest.mark.parametrize("optimizer", [[], DISTRIBUTED], ids=["adam", "distributed adam"])
def test_resume_continues_exactly(tmp_path, optimizer):
    flags = [*DROPOUT, *optimizer, "--save", str(tmp_path), "--save-interval", "5"]
    straight = train(*DROPOUT, *optimizer)
    train(*flags, "--exit-interval", "5")
    resumed = train(*flags, "--load", str(tmp_path), *profile(7, 9, tmp_path))
    assert sorted(resumed.losses) == [6, 7, 8, 9, 10]
    trace = gzip.decompress((tmp_path / "torch_profile" / "rank-0.json.gz").read_bytes())
    assert len(set(re.findall(rb"ProfilerStep#\d+", trace))) == 2  # though it counts from 0 here
    for iteration in resumed.losses:
        assert resumed.losses[iteration] == straight.losses[iteration]
        assert resumed.grad_norms[iteration] == straight.grad_norms[iteration]
    assert len(set(straight.losses.values())) == 10


def profile(start: int, end: int, folder: Path) -> list[str]:
    steps = ["--profile-step-start", str(start), "--profile-step-end", str(end)]
    return ["--profile", "--use-pytorch-profiler", *steps, "--tensorboard-dir", str(folder / "tb")]


def test_activations_are_recorded_without_transformer_engine(tmp_path):
    saved = ["--save", str(tmp_path), "--save-interval", "2", "--save-activations-interval", "2"]
    train(*NO_DROPOUT, *saved, iterations=2)
    files = list(tmp_path.glob("activations/iter_0000002/*.pth"))
    assert len(files) == 2  # ranks
    for file in files:
        recorded = torch.load(file, weights_only=True)["model_chunk0"]
        assert {name.split(".linear_fc1")[0] for name in recorded if ".mlp.experts." in name} >= {
            "decoder.layers.1.mlp.experts.local_experts.0",
            "decoder.layers.1.mlp.experts.local_experts.1",
        }


def test_distributed_optimizer_trains_as_the_plain_one():
    plain, distributed = train(*NO_DROPOUT), train(*NO_DROPOUT, *DISTRIBUTED)
    # The distributed optimizer sums gradients in another order.
    assert distributed.losses == pytest.approx(plain.losses, abs=2e-5)


@pytest.mark.parametrize("precision", ["--bf16", "--fp16"])
def test_low_precision_trains(precision):
    single, low = train(*NO_DROPOUT), train(*NO_DROPOUT, precision, "--initial-loss-scale", "1024")
    # Three significant digits in bf16: the losses fall alike, not equally.
    assert low.losses[10] == pytest.approx(single.losses[10], abs=0.05)
    assert low.losses[10] < low.losses[1] - 0.05


def test_refusal_is_one_line_and_status_2():
    run = run_pretrain([*TINY, "--train-iters", "1", "--scmoe-expert-slot", "7"], 2)
    assert run.status == 2
    assert run.error.startswith("--scmoe-expert-slot 7: ")
    assert "Traceback" not in run.output


def test_megatrons_own_refusals_are_one_line_too():
    run = run_pretrain([*TINY, "--train-iters", "1", "--num-attention-heads", "5"], 2)
    assert run.status == 2
    assert run.error
    assert "Traceback" not in run.output


def test_virtual_pipeline_stages_train():
    flags = [*NO_DROPOUT, "--num-layers", "8", "--moe-layer-freq", "[0,1]*4"]
    flags += ["--expert-model-parallel-size", "1"]
    stages = ["--pipeline-model-parallel-size", "2", "--num-layers-per-virtual-pipeline-stage", "2"]
    staged, plain = train(*flags, *stages, iterations=3), train(*flags, iterations=3)
    # Each stage draws its initial weights from a seed of its own.
    assert staged.losses == pytest.approx(plain.losses, abs=0.03)
    assert staged.losses[3] < staged.losses[1] - 0.2
