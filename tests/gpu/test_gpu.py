"""On GPUs: Transformer Engine, bf16, NCCL; overlap seen in a profiler's trace.

Needs one GPU; what needs two says so. Run it with ``make test-gpu``.
"""

import functools
import hashlib
import importlib.util

import pytest
import torch

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.overlap.schedule import TAP_BOUNDARY, num_slots
from tests import models
from tests.gpu.rank_sets import EXACT, EXACT_ONE_QUEUE, GPUS
from tests.harness import run_distributed, run_pretrain

pytestmark = [
    pytest.mark.skipif(GPUS == 0, reason="needs a GPU"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
    ),
]
requires_multi_gpu = pytest.mark.skipif(GPUS < 2, reason="needs two GPUs")

FLAGS = """
    --transformer-impl transformer_engine --bf16 --num-layers 4 --hidden-size 256
    --num-attention-heads 4 --seq-length 256 --max-position-embeddings 256 --ffn-hidden-size 512
    --moe-ffn-hidden-size 512 --swiglu --disable-bias-linear --normalization RMSNorm
    --position-embedding-type rope --num-experts 8 --moe-layer-freq [0,1]*2 --moe-router-topk 2
    --moe-token-dispatcher-type alltoall --moe-grouped-gemm --moe-permute-fusion
    --moe-router-load-balancing-type aux_loss --moe-aux-loss-coeff 1e-2
    --moe-shared-expert-intermediate-size 512 --micro-batch-size 4 --global-batch-size 16
    --train-iters 30 --lr 1e-3 --lr-warmup-iters 2 --log-interval 1 --eval-iters 1
    --eval-interval 100 --mock-data --tokenizer-type NullTokenizer --vocab-size 1024
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --no-gradient-accumulation-fusion --num-workers 0 --distributed-timeout-minutes 2
    --scmoe-tune off
""".split()
"""Nothing is chosen for speed: a test has what it names."""

EP2 = "--expert-model-parallel-size 2"


@functools.cache
def trained(*flags: str, world_size: int = 1):
    """A run with FLAGS and these, which several tests compare others with."""
    run = run_pretrain([*FLAGS, *flags], world_size)
    assert run.status == 0, run.output[-2000:]
    return run


@pytest.mark.parametrize("norm", ["own", "shared"])
def test_transformer_engine_trains_in_bf16_on_one_gpu(norm):
    run = trained("--scmoe-router-norm", norm)
    assert run.losses[30] < run.losses[1] - 1.0


def test_selective_recompute_trains():
    flags = "--recompute-granularity selective --recompute-modules layernorm moe_act".split()
    plain = trained("--scmoe-router-norm", "shared")
    recomputed = trained("--scmoe-router-norm", "shared", *flags)
    assert recomputed.losses[1] == plain.losses[1]
    assert recomputed.losses[30] == pytest.approx(plain.losses[30], abs=0.1)


@requires_multi_gpu
def test_distributed_optimizer_with_its_overlaps_trains_over_nccl():
    flags = ["--expert-model-parallel-size", "2", "--use-distributed-optimizer"]
    flags += ["--overlap-grad-reduce", "--overlap-param-gather"]
    overlapped = trained(*flags, world_size=2)
    serial = trained(*flags, "--no-scmoe-overlap", world_size=2)
    assert overlapped.losses[30] < overlapped.losses[1] - 1.0
    assert overlapped.losses[1] == serial.losses[1]


@requires_multi_gpu
@pytest.mark.parametrize(
    "layout",
    [
        "--tensor-model-parallel-size 2 --sequence-parallel --expert-tensor-parallel-size 1",
        "--context-parallel-size 2",
    ],
    ids=["tensor", "context"],
)
def test_trains_alike_with_and_without_overlap_on(layout):
    flags = [*FLAGS, *layout.split(), *EP2.split()]
    overlapped, serial = (
        run_pretrain([*flags, *overlap], 2, environment=EXACT_ONE_QUEUE)
        for overlap in ([], ["--no-scmoe-overlap"])
    )
    assert len(overlapped.losses) == 30, overlapped.output[-2000:]
    assert overlapped.losses[30] < overlapped.losses[1] - 1.0
    assert overlapped.losses == serial.losses
    assert overlapped.grad_norms == serial.grad_norms


@requires_multi_gpu
def test_overlap_on_and_off_are_bit_identical():
    for digests in run_distributed(_train_all, 2, backend="nccl", environment=EXACT):
        for (tap, slot, chunks), (overlapped, serial, again) in digests.items():
            assert serial == again, "the kernels themselves are not deterministic"
            assert overlapped == serial, (tap, slot, chunks)
            assert len(set(overlapped)) == len(overlapped)


@pytest.mark.parametrize(
    ("tap", "modules"),
    [
        ("pos1", "attn"),
        ("pos2", "attn moe_router moe_preprocess"),
        ("pos2", "attn mlp moe_router moe_preprocess"),
        ("pos3", "attn mlp moe_router moe_preprocess"),
    ],
)
def test_captured_blocks_train_bit_identically(tap, modules):
    flags = ["--scmoe-tap", tap, "--te-rng-tracker", "--train-iters", "10"]
    graphs = f"--cuda-graph-impl transformer_engine --cuda-graph-modules {modules}".split()
    assert trained(*flags, *graphs).losses == trained(*flags).losses


CAPTURABLE = "--te-rng-tracker --train-iters 10 --eval-interval 4".split()
ROUTING, WHOLE = "attn moe_router moe_preprocess", "attn mlp moe_router moe_preprocess"


@requires_multi_gpu
@pytest.mark.parametrize(
    ("modules", "flags"),
    [
        (ROUTING, f"{EP2} --scmoe-tap pos3"),
        (WHOLE, f"{EP2} --scmoe-tap pos3 --scmoe-expert-slot 3"),
        (WHOLE, f"{EP2} --scmoe-expert-slot 2"),
        (WHOLE, f"{EP2} --no-scmoe-overlap"),
        (WHOLE, "--pipeline-model-parallel-size 2"),
        (
            WHOLE,
            f"{EP2} --scmoe-expert-slot 2 --use-distributed-optimizer --overlap-grad-reduce "
            "--overlap-param-gather",
        ),
    ],
)
def test_captured_blocks_train_bit_identically_on_two_gpus(modules, flags):
    flags = [*CAPTURABLE, *flags.split()]
    graphs = f"--cuda-graph-impl transformer_engine --cuda-graph-modules {modules}".split()
    captured = trained(*flags, *graphs, world_size=2)
    assert captured.losses == trained(*flags, world_size=2).losses


@requires_multi_gpu
def test_all_to_alls_lie_beside_compute_in_forward_and_backward():
    shares = run_distributed(_trace, 2, backend="nccl")[0]
    print({name: {k: round(v, 3) for k, v in share.items()} for name, share in shares.items()})
    for direction in ("forward", "backward"):
        assert shares["overlapped"][direction] > 0.5
        assert shares["serial"][direction] < 0.1


TE = dict(
    transformer_impl="transformer_engine",
    bf16=True,
    params_dtype=torch.bfloat16,
    pipeline_dtype=torch.bfloat16,
    moe_grouped_gemm=True,
    moe_permute_fusion=True,
)


def _build(scmoe: ScMoEConfig, **changes):
    world = torch.distributed.get_world_size()
    (model,) = models.build_scmoe(scmoe, dict(world_size=world, ep=world), **(TE | changes))
    return model.bfloat16()


def make_deterministic() -> None:
    """On ranks of the set EXACT."""
    torch.use_deterministic_algorithms(True, warn_only=True)


def _train_all() -> dict:
    make_deterministic()
    return {
        (tap, slot, chunks): tuple(
            train(ScMoEConfig(tap=tap, expert_slot=slot, overlap=overlap, chunks=chunks))
            for overlap in (True, False, False)
        )
        for tap in TAP_BOUNDARY
        for slot in range(num_slots(tap))
        for chunks in ((1, 2) if slot == 1 else (1,))
    }


def train(scmoe, steps: int = 6) -> list[str]:
    model = _build(
        scmoe,
        hidden_size=128,
        num_attention_heads=2,
        num_query_groups=2,
        ffn_hidden_size=256,
        moe_ffn_hidden_size=256,
        moe_shared_expert_intermediate_size=256,
        hidden_dropout=0.1,
    )
    rank = torch.distributed.get_rank()
    digests = []
    for step in range(steps):
        tokens, labels = models.batch(2 * step + rank)
        loss, gradients = models.loss_and_gradients(model, tokens, labels)
        digest = hashlib.sha256(loss.cpu().numpy().tobytes())
        for name in sorted(gradients):
            digest.update(gradients[name].float().cpu().numpy().tobytes())
        digests.append(digest.hexdigest())
        with torch.no_grad():
            for name, parameter in model.named_parameters():
                parameter -= 0.1 * gradients[name]
    return digests


def _trace() -> dict:
    small = models.SEQUENCE, models.MICRO_BATCH
    models.SEQUENCE, models.MICRO_BATCH = 4096, 4
    try:
        return {
            name: _hidden_shares(ScMoEConfig(tap="pos2", overlap=overlap))
            for name, overlap in (("overlapped", True), ("serial", False))
        }
    finally:
        models.SEQUENCE, models.MICRO_BATCH = small


def _hidden_shares(scmoe) -> dict:
    """The share of all-to-all kernel time during which a compute kernel ran, by direction."""
    model = _build(
        scmoe,
        hidden_size=2048,
        num_attention_heads=16,
        num_query_groups=16,
        ffn_hidden_size=8192,
        moe_ffn_hidden_size=8192,
        moe_shared_expert_intermediate_size=8192,
        moe_router_force_load_balancing=True,
    )
    tokens, labels = models.batch(torch.distributed.get_rank(), size=models.MICRO_BATCH)
    for _ in range(3):
        models.loss_and_gradients(model, tokens, labels)
    shares = {}
    activities = [torch.profiler.ProfilerActivity.CUDA, torch.profiler.ProfilerActivity.CPU]
    for parameter in model.parameters():
        parameter.grad = None
    for direction in ("forward", "backward"):
        torch.cuda.synchronize()
        torch.distributed.barrier()
        with torch.profiler.profile(activities=activities) as profile:
            if direction == "forward":
                loss = models.forward(model, tokens, labels).float().mean()
            else:
                loss.backward()
            torch.cuda.synchronize()
        shares[direction] = _share(profile)
    return shares


def _share(profile) -> float:
    kernels = [e for e in profile.events() if e.device_type == torch.autograd.DeviceType.CUDA]
    spans = [(e.name, e.time_range.start, e.time_range.end) for e in kernels]
    exchanges = [(a, b) for name, a, b in spans if "SendRecv" in name or "AllToAll" in name]
    compute = sorted(
        (a, b) for name, a, b in spans if "nccl" not in name.lower() and "Mem" not in name
    )
    merged: list[list[float]] = []
    for start, end in compute:
        if merged and start <= merged[-1][1]:
            merged[-1][1] = max(merged[-1][1], end)
        else:
            merged.append([start, end])
    total = sum(end - start for start, end in exchanges)
    covered = sum(
        max(0.0, min(end, b) - max(start, a)) for start, end in exchanges for a, b in merged
    )
    assert total > 0, "no all-to-all kernel in the trace"
    return covered / total
