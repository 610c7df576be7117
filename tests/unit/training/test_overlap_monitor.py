"""Which iterations are sampled, and what is advised, once."""

from math import nan
from types import SimpleNamespace

import pytest

from megatron_scmoe.analysis.overlap_report import OverlapReport, RankFigures
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.training import overlap_monitor
from megatron_scmoe.training.iterations import Iterations
from megatron_scmoe.training.overlap_monitor import OverlapMonitor
from tests import models

WELL = RankFigures(100.0, 20.0, 20.0, 1.0, 1.0, nan, nan)
EXPOSED = WELL._replace(exposed_forward_ms=19.0, exposed_backward_ms=9.0)
LATE = WELL._replace(lead_ms=0.01, late_share=0.9)


DEFAULT = ScMoEConfig()


def monitor(interval=100, scmoe=DEFAULT, **changes):
    return OverlapMonitor(interval, scmoe, models.transformer_config(**changes))


def said(figures, scmoe=DEFAULT, **changes):
    report = OverlapReport([figures], scmoe.overlap)
    return monitor(100, scmoe, **changes).lines(report, 99)[1:]


def test_a_run_that_overlaps_has_one_line():
    assert said(WELL) == []


@pytest.mark.parametrize(
    ("figures", "scmoe", "named"),
    [
        (EXPOSED, ScMoEConfig(), "--scmoe-expert-slot auto, --scmoe-chunks 2, --no-scmoe-overlap"),
        (EXPOSED, ScMoEConfig(chunks=2, expert_slot="auto"), "try --no-scmoe-overlap"),
        (EXPOSED, ScMoEConfig(overlap=False), "leave --no-scmoe-overlap out"),
        (LATE, ScMoEConfig(), "--cuda-graph-modules attn moe_router moe_preprocess, or a larger"),
        (LATE, ScMoEConfig(tap="pos1"), "--cuda-graph-modules attn, or a larger"),
    ],
)
def test_advice_names_what_to_change(figures, scmoe, named):
    (line,) = said(figures, scmoe)
    assert line.startswith("WARNING: ")
    assert named in line


def test_what_would_be_refused_is_not_advised():
    (line,) = said(EXPOSED, moe_pad_expert_input_to_capacity=True, moe_expert_capacity_factor=1.0)
    assert "--scmoe-chunks" not in line


def test_advice_is_given_once_for_each_reason():
    watching = monitor()
    found = [
        len(watching.lines(OverlapReport([figures], True), 99)) - 1
        for figures in (EXPOSED, EXPOSED, LATE, WELL, LATE, EXPOSED)
    ]
    assert found == [1, 0, 1, 0, 0, 0]


def test_schedule_that_was_made_serial_for_the_run_is_not_blamed_on_the_flags():
    assert monitor().lines(OverlapReport([EXPOSED], overlap=False), 99)[1:] == []


def test_writers_get_every_figure_under_its_iteration(monkeypatch, capsys):
    written = []
    wandb = SimpleNamespace(log=lambda scalars, step: written.append((scalars, step)))
    for name, stand_in in (("get_tensorboard_writer", None), ("get_wandb_writer", wandb)):
        monkeypatch.setattr(overlap_monitor, name, lambda writer=stand_in: writer)
    monkeypatch.setattr(overlap_monitor.torch.distributed, "get_rank", lambda: 0)
    monkeypatch.setattr(overlap_monitor.torch.distributed, "get_world_size", lambda: 1)
    report = OverlapReport([WELL], True, load=(1.5, 2))
    monitor().log(report, 99)
    assert written == [(report.scalars(), 99)]
    assert "scmoe/tokens-per-expert-max-over-mean" in written[0][0]
    assert capsys.readouterr().out == report.line(99) + "\n"


@pytest.mark.parametrize(
    ("interval", "sampled"), [(0, []), (1, [5, 6, 7, 8, 9]), (3, [5, 8]), (100, [])]
)
def test_sampled_is_what_precedes_every_nth_but_the_first(interval, sampled, monkeypatch):
    watching = monitor(interval)
    begun = []
    monkeypatch.setattr(overlap_monitor, "_ranks_of_replicas", lambda: [0])
    monkeypatch.setattr(overlap_monitor.torch.distributed, "get_world_size", lambda: 1)
    monkeypatch.setattr(overlap_monitor, "record_with", lambda recorder: begun.append(recorder))
    found = []
    for iteration in range(4, 10):  # a run that goes on after three
        watching.iteration_begins(iteration - 1)
        found += [iteration] * len(begun)
        begun.clear()
    assert found == sampled


def test_an_iteration_is_over_before_it_is_evaluated_and_before_the_next(monkeypatch):
    state = SimpleNamespace(curr_iteration=0)
    monkeypatch.setattr("megatron_scmoe.training.iterations.get_args", lambda: state)
    events, iterations = [], Iterations()
    iterations.listeners.append(lambda done: events.append(f"begins after {done}"))
    iterations.over.append(lambda: events.append("over"))
    for done, is_training in ((0, True), (0, True), (1, True), (1, False), (1, False), (2, True)):
        state.curr_iteration = done
        iterations.micro_batch_begins(is_training)
    assert " ".join(events) == "begins after 0 over begins after 1 over begins after 2"
