"""CUDA graphs of a decode, Transformer Engine's experts and NCCL's all-to-alls in them.

Needs one GPU, two for the all-to-alls, and Transformer Engine.
"""

from dataclasses import replace
from pathlib import Path
from unittest import mock

import pytest
import torch
from megatron.core import parallel_state
from megatron.core.inference.utils import InferenceMode

from megatron_scmoe.config import AUTO, OFF, ON, OVERLAPPED, SERIAL
from megatron_scmoe.inference.cached_model import CachedModel
from megatron_scmoe.inference.decode_graphs import DecodeGraphs
from megatron_scmoe.inference.decode_schedule import Decode
from megatron_scmoe.training import load_model
from tests import text_models
from tests.benchmarks import benchmark
from tests.distributed import test_slots
from tests.gpu.rank_sets import HOST_STAGED
from tests.gpu.test_gpu import requires_multi_gpu
from tests.gpu.test_offloading import pytestmark  # noqa: F401
from tests.harness import run_distributed

CONTEXT, TOKENS, ROWS = 12, 6, 3
NVLINK: dict[str, str] = {}


@pytest.mark.parametrize("schedule", [OVERLAPPED, SERIAL])
def test_graphs_give_the_logits_of_a_decode_without(schedule):
    (found,) = run_distributed(_logits, 1, schedule, backend="nccl")
    _check(*found)


@requires_multi_gpu
@pytest.mark.parametrize("schedule", [OVERLAPPED, SERIAL])
@pytest.mark.parametrize("link", [NVLINK, HOST_STAGED], ids=["nvlink", "host-staged"])
def test_with_all_to_alls_in_them_too(schedule, link):
    for found in run_distributed(_logits, 2, schedule, backend="nccl", environment=link):
        _check(*found)


def test_a_server_writes_the_same_in_graphs(tmp_path):
    """Megatron's local modules, masks, fewer groups of keys than heads, many graphs in one pool."""
    name = text_models.TAPS_INPUT
    text_models.save(tmp_path, text_models.train_tokenizer(tmp_path), name)
    (found,) = run_distributed(_served, 1, str(tmp_path / name), backend="nccl")
    (without, _), (within, graphs) = found
    assert graphs > 2
    for one, other in zip(within, without, strict=True):
        assert one[0] == other[0]
        assert one[1] == pytest.approx(other[1], abs=1e-3)


def _served(load: str) -> list[tuple[list[tuple], int]]:
    """Texts that join and leave a batch, without graphs and with them; and how many there are."""
    found = []
    model, args = test_slots._model(load, load_model.Layout())
    for use in (OFF, ON):
        made: list[DecodeGraphs] = []
        new = DecodeGraphs.__init__

        def remember(graphs, *given, new=new, made=made):
            made.append(graphs)
            new(graphs, *given)

        with mock.patch.object(DecodeGraphs, "__init__", remember):
            texts, _ = test_slots._join_and_leave(model, args, padding=ON, graphs=use)
        found.append((texts, sum(len(each._graphs) for each in made)))
    return found


@pytest.mark.parametrize("at_the_gate", [True, False])
@pytest.mark.parametrize("slots", [2, 6])
def test_with_offloaded_experts_between_the_graphs(slots, at_the_gate):
    ((resident, offloaded),) = run_distributed(
        _offloaded_logits, 1, slots, at_the_gate, backend="nccl"
    )
    _check(*offloaded)
    assert torch.equal(resident[1], offloaded[1])


def _offloaded_logits(slots: int, at_the_gate: bool) -> tuple[tuple, tuple]:
    """As :func:`_logits`, of one row, and the same with experts that come from the host, two layers of
    eight."""
    offloading = benchmark("offloading")
    shape = replace(offloading.SHAPES["gpt2-small"], blocks=4, vocab=1000)
    parallel_state.initialize_model_parallel()
    with torch.no_grad(), InferenceMode.active():
        model = offloading.build(shape, None)
        resident = _decoded(model, 1, shape.vocab, OVERLAPPED)
        rest, experts = offloading.taken_apart(model)
        model = offloading.build(shape, offloading.ExpertOffload(offloading.OffloadSettings()))
        model.load_state_dict(rest, strict=False)
        packing = offloading.offloaded_layers(model)[0][1].packing
        host = offloading.on_the_host(experts, packing, Path())
        cache = offloading.ExpertCache(packing, slots, host)
        offloading.connect(model, cache, at_the_gate)
        return resident, _decoded(model, 1, shape.vocab, OVERLAPPED)


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
    with torch.no_grad(), InferenceMode.active():
        return _decoded(offloading.build(shape, None), ROWS, shape.vocab, schedule)


def _decoded(model, rows: int, vocab: int, schedule: str) -> tuple:
    """Logits without graphs, with them, and with them again; and how many graphs there are."""
    found, graphs = [], 0
    generator = torch.Generator().manual_seed(torch.distributed.get_rank())
    tokens = torch.randint(vocab, (rows, CONTEXT + TOKENS), generator=generator)
    positions = torch.arange(CONTEXT + TOKENS).expand(rows, -1)
    for use in (OFF, ON, ON):
        cached = CachedModel(model, rows, 64, Decode(model, schedule, AUTO, use))
        cached.read(tokens[:, :CONTEXT], positions[:, :CONTEXT])
        with benchmark("offloading").sums_in_one_order():
            logits = [
                cached.decode(
                    rows,
                    tokens[:, at : at + 1],
                    positions[:, at : at + 1],
                    column=at,
                    from_first=True,
                )
                for at in range(CONTEXT, CONTEXT + TOKENS)
            ]
        found.append(torch.cat(logits, 1))
        graphs = len(cached._graphs._graphs) if cached._graphs else 0
    return *found, graphs
