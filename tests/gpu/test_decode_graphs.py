"""CUDA graphs of a decode, Transformer Engine's experts and NCCL's all-to-alls in them.

Needs one GPU, two for the all-to-alls, and Transformer Engine.
"""

from dataclasses import replace

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.inference.utils import InferenceMode

from megatron_scmoe.config import AUTO, OFF, ON, OVERLAPPED, SERIAL
from megatron_scmoe.inference.cached_model import CachedModel
from megatron_scmoe.inference.decode_schedule import Decode
from tests.benchmarks import benchmark
from tests.gpu.test_gpu import requires_multi_gpu
from tests.gpu.test_offloading import pytestmark  # noqa: F401
from tests.harness import run_distributed

CONTEXT, TOKENS, ROWS = 12, 6, 3
NVLINK: dict[str, str] = {}
HOST_STAGED = {"NCCL_P2P_DISABLE": "1"}


@pytest.mark.parametrize("schedule", [OVERLAPPED, SERIAL])
def test_graphs_give_the_logits_of_a_decode_without(schedule):
    (found,) = run_distributed(_logits, 1, schedule, backend="nccl")
    _check(*found)


@requires_multi_gpu
@pytest.mark.parametrize("schedule", [OVERLAPPED, SERIAL])
@pytest.mark.parametrize("link", [NVLINK, HOST_STAGED])
def test_with_all_to_alls_in_them_too(schedule, link):
    for found in run_distributed(_logits, 2, schedule, backend="nccl", environment=link):
        _check(*found)


def _check(without, within, again, graphs):
    assert graphs == 1
    assert (within - without).abs().max() < 0.1 * without.std()  # bf16, summed in another order
    assert torch.equal(within, again)


def _logits(schedule: str) -> tuple:
    """Of each token behind the same prompts, without graphs and with them; and how many there are."""
    offloading = benchmark("offloading")
    shape = replace(offloading.SHAPES["gpt2-small"], blocks=4, vocab=1000)
    ranks = torch.distributed.get_world_size()
    parallel_state.initialize_model_parallel(expert_model_parallel_size=ranks)
    found, graphs = [], 0
    with torch.no_grad(), InferenceMode.active():
        model = offloading.build(shape, None)
        generator = torch.Generator().manual_seed(torch.distributed.get_rank())
        tokens = torch.randint(shape.vocab, (ROWS, CONTEXT + TOKENS), generator=generator)
        for use in (OFF, ON, ON):
            cached = CachedModel(model, ROWS, 64, Decode(model, schedule, AUTO, use))
            positions = torch.arange(CONTEXT + TOKENS).expand(ROWS, -1)
            cached.read(tokens[:, :CONTEXT], positions[:, :CONTEXT])
            logits = [
                cached.decode(ROWS, tokens[:, at : at + 1], positions[:, at : at + 1], column=at)
                for at in range(CONTEXT, CONTEXT + TOKENS)
            ]
            found.append(torch.cat(logits, 1))
            graphs = len(cached._graphs._graphs) if cached._graphs else 0
    return *found, graphs
