"""The all-to-all by copy engines against NCCL's. Needs two GPUs and cuda-bindings."""

import random

import pytest
import torch

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.overlap.async_all_to_all import AllToAll, Flight
from megatron_scmoe.overlap.copy_engine import rings
from megatron_scmoe.overlap.exchanges import exchange_for
from tests.gpu.rank_sets import EXACT, GPUS
from tests.gpu.test_gpu import (
    CAPTURABLE,
    EP2,
    make_deterministic,
    pytestmark,  # noqa: F401  (skips this module too)
    requires_multi_gpu,
    train,
    trained,
)
from tests.harness import run_distributed

EXCHANGES = ("copy-host", "copy-peer")
RANKS = min(GPUS, 4)
CAPTURED = [
    *("--cuda-graph-impl", "transformer_engine"),
    *("--cuda-graph-modules", "attn", "mlp", "moe_router", "moe_preprocess"),
]


@requires_multi_gpu
@pytest.mark.skipif(rings.driver is None, reason="needs cuda-bindings")
def test_copies_equal_nccl_and_train_bit_identically():
    for found in run_distributed(_compare, RANKS, backend="nccl", environment=EXACT):
        assert found["exchanges"] == []
        reference = found["trained"].pop("collective")
        assert len(set(reference)) == len(reference)
        for name, digests in found["trained"].items():
            assert digests == reference, name


@requires_multi_gpu
@pytest.mark.skipif(rings.driver is None, reason="needs cuda-bindings")
@pytest.mark.parametrize("exchange", EXCHANGES)
def test_pretraining_with_captured_blocks(exchange):
    flags = [*CAPTURABLE, *EP2.split(), "--scmoe-expert-slot", "2"]
    copies = trained(*flags, *CAPTURED, "--scmoe-exchange", exchange, world_size=2)
    assert copies.losses == trained(*flags, world_size=2).losses


def _compare() -> dict:
    make_deterministic()
    wrong = [name for name in EXCHANGES if not _equals_nccl(name)]
    trained = {"collective": train(ScMoEConfig(), steps=5)}
    backward = ["dispatch-backward", "combine-backward"]
    for name in EXCHANGES:
        for copied in (backward, ["dispatch", *backward]):
            scmoe = ScMoEConfig(exchange=name, copy_engine_all_to_alls=copied)
            trained[name, *copied] = train(scmoe, steps=5)
        for overlap, chunks in ((True, 1), (False, 1), (True, 2), (False, 2)):
            scmoe = ScMoEConfig(exchange=name, overlap=overlap, chunks=chunks)
            digests = train(scmoe, steps=5)
            if chunks == 1:
                trained[name, overlap] = digests
            elif overlap:
                chunked = digests
            elif digests != chunked:
                wrong.append(f"{name} with two chunks")
    return {"exchanges": wrong, "trained": trained}


def _equals_nccl(name: str) -> bool:
    """Forward and backward of exchanges of all sizes, several of them under way at once."""
    group = torch.distributed.group.WORLD
    rank, size = group.rank(), group.size()
    exchange = exchange_for(group, ScMoEConfig(exchange=name))
    draw = random.Random(0)
    for _ in range(4):
        matrices = [
            [[draw.choice([0, 1, 3, 4096, 30000]) for _ in range(size)] for _ in range(size)]
            for _ in range(3)
        ]
        results = []
        for kind in (AllToAll, exchange):
            torch.manual_seed(rank)
            inputs, flights = [], []
            for matrix in matrices:
                sent, received = matrix[rank], [row[rank] for row in matrix]
                tokens = torch.randn(sum(sent), 512, device="cuda", requires_grad=True)
                probs = torch.randn(sum(sent), device="cuda", requires_grad=True)
                flight = Flight(tokens, probs)
                flight.launch(kind(group, received, sent, "dispatch"))
                inputs += [tokens, probs]
                flights.append(flight)
            outputs = [tensor for flight in flights for tensor in flight.arrive()]
            sum((tensor * tensor.detach().sin()).sum() for tensor in outputs).backward()
            results.append([*outputs, *(tensor.grad for tensor in inputs)])
        torch.cuda.synchronize()
        if not all(torch.equal(a, b) for a, b in zip(*results, strict=True)):
            return False
    return True
