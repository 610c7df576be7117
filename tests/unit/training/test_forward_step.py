"""A micro-batch: its loss is checked as the flags say, and its parts are timed for stragglers."""

import logging
from types import SimpleNamespace

import pytest
import torch
from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

from megatron_scmoe.training import forward_step

MASK = torch.ones(1, 4)


@pytest.fixture
def rerun(monkeypatch):
    """Megatron's machine that judges losses, in the mode that only tells."""
    machine = RerunStateMachine(mode=RerunMode.DISABLED)
    monkeypatch.setattr(forward_step, "get_rerun_state_machine", lambda: machine)
    return machine


def flags(monkeypatch, **given) -> None:
    checks = {"check_for_nan_in_loss_and_grad": False, "check_for_spiky_loss": False}
    monkeypatch.setattr(forward_step, "get_args", lambda: SimpleNamespace(**checks | given))


@pytest.mark.parametrize("is_asked_for", [True, False])
def test_a_spiky_loss_is_told(is_asked_for, monkeypatch, rerun, caplog):
    flags(monkeypatch, check_for_spiky_loss=is_asked_for)
    caplog.set_level(logging.WARNING)
    for _ in range(100):  # what Megatron takes the largest loss of
        forward_step.loss_function(MASK, torch.full((1, 4), 2.0))
    for times, is_spiky in ((forward_step.SPIKE - 1, False), (forward_step.SPIKE, True)):
        caplog.clear()
        forward_step.loss_function(MASK, torch.full((1, 4), 2.0 * times))
        assert ("Spiky loss" in caplog.text) == (is_spiky and is_asked_for)


def test_the_straggler_detector_times_data_and_forward(monkeypatch):
    detector, timed = forward_step.straggler_detector, []

    def start() -> None:
        timed.append("data" if detector.bdata else "compute")

    def stop() -> None:
        timed.append("over")
        detector.bdata = False  # as Megatron's does

    monkeypatch.setattr(detector, "start", start)
    monkeypatch.setattr(detector, "stop", stop)
    monkeypatch.setattr(forward_step, "get_timers", lambda: lambda *_, **__: _Timer())
    monkeypatch.setattr(forward_step, "get_batch", lambda *_: timed.append("batch") or [MASK] * 5)
    forward_step.forward_step(None, _Model(timed))
    assert timed == ["data", "batch", "over", "compute", "forward", "over"]


class _Timer:
    def start(self) -> None: ...

    def stop(self) -> None: ...


class _Model:
    vp_stage = None

    def __init__(self, timed: list[str]):
        self.timed = timed

    def __call__(self, *batch, **labels) -> None:
        self.timed.append("forward")
