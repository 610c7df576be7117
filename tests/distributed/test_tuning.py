"""``--scmoe-expert-slot auto``: times measured or read, one slot on all ranks."""

import json

import pytest
import torch
from megatron.core import tensor_parallel
from megatron.core.transformer.moe.moe_logging import get_moe_metrics_tracker

from megatron_scmoe.analysis import slot_tuner
from megatron_scmoe.analysis.simulator import OPERATORS, OperatorTimes
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.model.moe_layer import ScMoELayer
from megatron_scmoe.overlap.schedule import TAP_BOUNDARY, num_slots
from tests import models
from tests.distributed.test_training import TINY, train
from tests.harness import run_distributed, run_pretrain

CASES = [
    *(dict(tap=tap) for tap in TAP_BOUNDARY),
    dict(router_norm="shared", chunks=2),
    dict(tap="pos3", router_norm="shared", combine="cg2", post_norm=True),
]


@pytest.fixture(scope="module")
def tuned():
    """What each of two expert-parallel ranks found, by case."""
    return run_distributed(_tune_all, 2)


@pytest.mark.parametrize("case", range(len(CASES)))
def test_all_ranks_agree_and_nothing_stays_behind(tuned, case):
    first, second = (rank[case] for rank in tuned)
    assert first["slots"] == second["slots"]
    assert len(set(first["slots"])) == 1, "every pair of the model gets the slot"
    for rank in (first, second):
        assert rank["changed"] == []


@pytest.mark.parametrize("case", range(len(CASES)))
def test_every_operator_that_the_pair_has_was_timed(tuned, case):
    times = tuned[0][case]["times"]
    needs_dense = CASES[case].get("tap", "pos2") != "pos1"
    for name in OPERATORS:
        there = needs_dense or name not in ("attention", "mlp")
        for direction in (times.forward, times.backward):
            assert (direction[name] > 0) == there, name


def _tune_all() -> list[dict]:
    return [_tune(ScMoEConfig(expert_slot="auto", **case)) for case in CASES]


def _tune(scmoe: ScMoEConfig) -> dict:
    chunks = models.build_scmoe(
        scmoe, models.LAYOUTS["EP2"], moe_router_enable_expert_bias=True,
        moe_router_score_function="sigmoid", hidden_dropout=0.1,
    )  # fmt: skip
    models.forward(chunks[0], *models.batch(0))  # statistics to preserve
    before = _state(chunks)
    found = {}
    choose, slot_tuner.block_time = slot_tuner.block_time, _remember(found, slot_tuner.block_time)
    slot_tuner.choose_slot(chunks, scmoe, models.MICRO_BATCH, models.SEQUENCE)
    slot_tuner.block_time = choose
    after = _state(chunks)
    found["changed"] = [name for name in before if not torch.equal(before[name], after[name])]
    found["changed"] += [n for n, p in chunks[0].named_parameters() if p.grad is not None]
    logged = get_moe_metrics_tracker().metrics
    found["changed"] += [name for name, entry in logged.items() if entry.values.any()]
    layers = [m for m in chunks[0].modules() if isinstance(m, ScMoELayer)]
    found["slots"] = [int(layer.path.schedule.slot) for layer in layers]
    return found


def _remember(found: dict, block_time):
    def remembering(schedule, times):
        found["times"] = times
        return block_time(schedule, times)

    return remembering


def _state(chunks) -> dict:
    tracker = tensor_parallel.get_cuda_rng_tracker().get_states()
    state = {f"random state {name}": value.clone() for name, value in tracker.items()}
    state["random state"] = torch.get_rng_state()
    for chunk in chunks:
        state |= {name: value.detach().clone() for name, value in chunk.named_parameters()}
        state |= {name: value.clone() for name, value in chunk.named_buffers()}
    return state


def write_times(path, **other: float) -> None:
    """1 ms for each operator, forward and backward, but for those named."""
    times = dict.fromkeys(OPERATORS, 1.0) | other
    OperatorTimes(times, times).write(path)


def test_the_script_measures_logs_writes_and_then_reads(tmp_path):
    path = tmp_path / "times.json"
    flags = ["--scmoe-expert-slot", "auto", "--scmoe-operator-times", str(path)]
    run = train(*flags, iterations=2)
    assert "operator times of a pair in ms, measured" in run.output
    assert run.output.count("<- chosen") == 1
    written = json.loads(path.read_text())
    assert set(written["forward"]) == set(OPERATORS)
    assert written["measured_on"]["expert_model_parallel_size"] == 2
    assert written["measured_on"]["tokens_per_sequence"] == 32
    plain = train(iterations=2)
    assert run.losses == plain.losses, "measuring must not change the training"

    write_times(path, dispatch=2.0)  # needs two operators of 1 ms, the combine the one left
    run = train(*flags, iterations=2)
    assert f"operator times of a pair in ms, from {path}" in run.output
    (chosen,) = (line for line in run.output.splitlines() if "<- chosen" in line)
    assert chosen.split() == ["2", "16.000", "-", "<-", "chosen"]


def test_a_file_of_something_else_is_refused(tmp_path):
    path = tmp_path / "times.json"
    path.write_text('{"forward": {}}')
    flags = ["--scmoe-expert-slot", "auto", "--scmoe-operator-times", str(path)]
    flags += ["--train-iters", "1", "--expert-model-parallel-size", "1"]
    run = run_pretrain([*TINY, *flags], 1)
    assert run.status == 2
    assert run.error.startswith(f"--scmoe-operator-times {path}: forward 'attention' is None")


def test_times_of_another_model_are_refused(tmp_path):
    path = tmp_path / "times.json"
    write_times(path)
    found = json.loads(path.read_text()) | {"measured_on": {"hidden_size": 64}}
    path.write_text(json.dumps(found))
    flags = ["--scmoe-expert-slot", "auto", "--scmoe-operator-times", str(path)]
    flags += ["--train-iters", "1", "--expert-model-parallel-size", "1"]
    run = run_pretrain([*TINY, *flags], 1)
    assert run.status == 2
    expected = "its times were measured with hidden_size 64, and this is 32"
    assert run.error.startswith(f"--scmoe-operator-times {path}: {expected}")


def test_pipeline_stages_agree():
    slots = run_distributed(_tune_pipeline, 2)
    assert slots[0] == slots[1]
    assert 0 <= slots[0] < num_slots("pos2")


def _tune_pipeline() -> int:
    scmoe = ScMoEConfig(expert_slot="auto")
    chunks = models.build_scmoe(scmoe, models.LAYOUTS["PP2"])
    slot_tuner.choose_slot(chunks, scmoe, models.MICRO_BATCH, models.SEQUENCE)
    (slot,) = {int(m.path.schedule.slot) for m in chunks[0].modules() if isinstance(m, ScMoELayer)}
    return slot - TAP_BOUNDARY["pos2"]
