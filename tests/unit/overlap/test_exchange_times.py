"""Exchanges on a clock that only what is simulated moves: a slow link, and compute beside it."""

import time

import pytest
import torch

from megatron_scmoe.overlap.async_all_to_all import Exchange, Flight, record_with
from megatron_scmoe.overlap.exchange_times import ExchangeRecorder
from megatron_scmoe.platform import cpu_backend

pytestmark = pytest.mark.skipif(
    not cpu_backend.is_enabled(), reason="a GPU's events have a clock of their own"
)

LINK_MS = 60.0


class Clock:
    now = 100.0

    def __call__(self) -> float:
        return self.now

    def pass_ms(self, ms: float) -> None:
        self.now += ms / 1e3


class SlowLink(Exchange):
    """What is launched arrives LINK_MS later."""

    def __init__(self, clock: Clock):
        self.clock = clock
        self.event = None

    def launch(self, tensors):
        self.sent, self.arrival = tensors, self.clock.now + LINK_MS / 1e3

    def record_arrival(self, event):
        self.event = event

    def wait(self):
        needed, self.clock.now = self.clock.now, self.arrival
        if self.event is not None:
            self.event.record()
        self.clock.now = max(needed, self.arrival)
        return tuple(self.sent)

    launch_backward, wait_backward = launch, wait


@pytest.fixture
def clock(monkeypatch):
    clock = Clock()
    monkeypatch.setattr(time, "perf_counter", clock)
    yield clock
    record_with(None)


class Compute(torch.autograd.Function):
    """Takes so many ms, forward and backward."""

    @staticmethod
    def forward(ctx, tensor, clock, ms):
        ctx.clock, ctx.ms = clock, ms
        clock.pass_ms(ms)
        return tensor.clone()

    @staticmethod
    def backward(ctx, grad):
        ctx.clock.pass_ms(ctx.ms)
        return grad, None, None


def step(clock, ms):
    """One exchange, and compute of ``ms`` under it, forward and backward."""
    backbone = torch.ones(2, requires_grad=True)
    flight = Flight(torch.ones(2, requires_grad=True) * 1.0)
    flight.launch(SlowLink(clock))
    computed = Compute.apply(backbone, clock, ms)
    (arrived,) = flight.arrive()
    (computed + arrived).sum().backward()


@pytest.mark.parametrize(("compute_ms", "exposed_ms"), [(40, 20), (0, 60), (80, 0)])
def test_compute_waits_for_what_it_does_not_cover(clock, compute_ms, exposed_ms):
    recorder = ExchangeRecorder()
    record_with(recorder)
    step(clock, compute_ms)
    record_with(None)
    forward, backward = recorder.read()
    assert (forward.is_backward, backward.is_backward) == (False, True)
    for times in (forward, backward):
        assert times.done - times.begun == pytest.approx(LINK_MS)
        assert times.reached - times.begun == pytest.approx(compute_ms)
        assert times.resumed - times.reached == pytest.approx(exposed_ms)


def test_nothing_is_recorded_before_and_after(clock):
    recorder = ExchangeRecorder()
    step(clock, 1)
    record_with(recorder)
    record_with(None)
    step(clock, 1)
    assert recorder.read() == []


def test_what_is_never_waited_for_has_no_times(clock):
    recorder = ExchangeRecorder()
    record_with(recorder)
    Flight(torch.ones(2)).launch(SlowLink(clock))
    assert recorder.read() == []
