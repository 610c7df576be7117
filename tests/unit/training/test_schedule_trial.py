"""Schedules tried on a run's iterations: which, when, and what is kept."""

from argparse import Namespace

import pytest
from megatron.core.transformer.enums import CudaGraphModule

from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.errors import InputError, ScMoEConfigError
from megatron_scmoe.training import schedule_trial
from megatron_scmoe.training.iterations import Iterations
from megatron_scmoe.training.schedule_trial import Candidate, ScheduleTrial, candidates
from megatron_scmoe.training.trial_record import Record, choose
from tests import models
from tests.harness import run_distributed

GRAPHS = dict(
    cuda_graph_impl="transformer_engine",
    cuda_graph_modules=[
        CudaGraphModule[n] for n in ("attn", "mlp", "moe_router", "moe_preprocess")
    ],
    transformer_impl="transformer_engine",
    bf16=True,
)
OWN, OTHER, SERIAL = Candidate(1, True), Candidate(2, True), Candidate(1, False)


@pytest.mark.parametrize(
    ("settings", "given", "changes", "names"),
    [
        ({}, (), {}, ["1", "0", "2", "3", "serial"]),
        (dict(tap="pos1"), (), {}, ["1", "0", "2", "serial"]),
        ({}, ("scmoe_expert_slot",), {}, ["1", "serial"]),
        ({}, ("scmoe_overlap",), {}, ["1", "0", "2", "3"]),
        (dict(overlap=False), ("scmoe_overlap",), {}, ["serial"]),
        (dict(expert_slot="auto"), ("scmoe_expert_slot",), {}, ["auto", "serial"]),
        (dict(expert_slot=2), (), GRAPHS, ["2", "3", "serial"]),
        ({}, (), dict(expert_model_parallel_size=1), ["1"]),
    ],
)
def test_what_is_tried(settings, given, changes, names):
    """What the command line leaves open, and rules accept beside the graphs that are captured."""
    config = models.transformer_config(**dict(ep=2) | changes)
    found = candidates(ScMoEConfig(**settings), config, given)
    assert [each.name.removeprefix("overlapped, slot ") for each in found] == names


def test_a_file_that_no_trial_needs_is_named(capsys):
    args = Namespace(scmoe_tune="x.json", skip_train=False)
    args.step_batch_size_schedule = args.iterations_to_skip = None
    config = models.transformer_config(ep=1)
    assert schedule_trial.prepare(args, ScMoEConfig(), config, (), Iterations()) is None
    assert (
        "overlapped, slot 1 alone is left to the run; x.json is neither" in capsys.readouterr().out
    )


@pytest.mark.parametrize(
    ("own", "other", "kept"), [(100, 99.5, "a"), (100, 98, "b"), (90, 98, "a")]
)
def test_another_schedule_has_to_be_faster_by_more_than_noise(own, other, kept):
    assert choose(["a", "b"], [own, other]) == kept


def _times(evaluated: tuple[int, ...], durations: dict[str, list[float]], train_iters: int = 50):
    """A trial on one rank by a clock of the schedules' durations; its record, and the iterations."""
    now, found = [0.0], []
    schedule_trial.clock = lambda: now[0]
    args = Namespace(train_iters=train_iters, manual_gc=False, save=None, profile=False)
    schedule_trial.get_args = lambda: args
    schedule_trial.print_rank_0 = found.append
    iterations = Iterations()
    tried = (OWN, OTHER, SERIAL)
    trial = ScheduleTrial(ScMoEConfig(), tried, {}, 2, iterations)
    names = []
    trial._set = names.append
    for done in range(10, 30):
        iterations.evaluated = done in evaluated
        trial.iteration_begins(done)
        name = names[-1] if names else OWN.name
        now[0] += 1000 if done + 1 in evaluated else durations[name].pop(0)
    return found, names


def _same(ms: float) -> list[float]:
    return [ms / 1000] * 30


def test_medians_decide_and_evaluations_do_not_count():
    durations = {OWN.name: _same(10), OTHER.name: [9, *_same(8)], SERIAL.name: _same(9)}
    ((block,), names), *_ = run_distributed(_times, 1, (14, 17), durations)
    assert "tried on iterations 13 to 23" in block, "nine and the two that were tried again"
    lines = [line.split() for line in block.splitlines()]
    assert ["overlapped,", "slot", "2", "8.00", "<-", "kept"] in lines
    assert names[-1] == OTHER.name
    assert names[-2] == OWN.name, "while the ranks agree"


def test_a_run_that_is_too_short_tries_nothing():
    durations = {name.name: _same(10) for name in (OWN, OTHER, SERIAL)}
    (((line,), names),) = run_distributed(_times, 1, (), durations, train_iters=22)
    assert "it takes 13 iterations, and the run has 12" in line
    assert names == []


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "[" * 100_000,
        '{"measured_on": {}, "ms": {}, "chosen": "serial"}',
        '{"measured_on": {}, "ms": {}, "chosen": []}',
    ],
)
def test_a_file_of_something_else_is_refused(tmp_path, text):
    file = tmp_path / "tune.json"
    file.write_text(text)
    with pytest.raises(InputError, match=f"--scmoe-tune {file}: "):
        Record.read(file)


def test_a_trial_of_another_model_is_refused():
    record = Record({"hidden_size": 64, "schedules": ["serial"]}, {"serial": 1.0}, "serial")
    expected = (
        "its schedules were tried with hidden_size 64, and this is 32; accepted: another file"
    )
    with pytest.raises(ScMoEConfigError, match=expected):
        record.check("tune.json", {"schedules": ["serial"], "hidden_size": 32})
