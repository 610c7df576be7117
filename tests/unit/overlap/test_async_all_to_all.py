"""Tensors under way: autograd never reads them, and nothing is dropped before it has been read."""

import gc
import weakref

import pytest
import torch

from megatron_scmoe.overlap.async_all_to_all import Exchange, Flight, OnLaunchStream


class SlowDoubling(Exchange):
    """Doubles; what it returns is NaN until it is waited for, as if it were still being filled."""

    def launch(self, tensors):
        self.sent = [tensor.clone() for tensor in tensors]
        self.arriving = [torch.full_like(tensor, torch.nan) for tensor in tensors]

    def wait(self):
        for tensor, sent in zip(self.arriving, self.sent):
            tensor.copy_(2 * sent)
        return tuple(self.arriving)

    launch_backward, wait_backward = launch, wait


def send(*tensors, exchange=None):
    flight = Flight(*tensors)
    flight.launch(exchange or SlowDoubling())
    return flight.arrive()


@pytest.fixture
def anomaly_detection():
    with torch.autograd.detect_anomaly():
        yield


@pytest.mark.usefixtures("anomaly_detection")
def test_anomaly_detection_does_not_read_gradients_under_way():
    tokens = torch.arange(6.0).view(3, 2).requires_grad_()
    probs = torch.ones(3, dtype=torch.float64, requires_grad=True)
    arrived, weights = send(tokens, probs)
    (arrived.square().sum() + weights.sum()).backward()
    assert torch.equal(tokens.grad, 8 * tokens.detach())
    assert torch.equal(probs.grad, torch.full((3,), 2.0, dtype=torch.float64))


@pytest.mark.usefixtures("anomaly_detection")
def test_anomaly_detection_still_finds_a_nan_behind_the_exchange():
    (arrived,) = send(torch.zeros(2, requires_grad=True))
    with pytest.raises(RuntimeError, match="returned nan values"):
        (arrived.sqrt() * 0.0).sum().backward()


def test_hooks_and_retained_gradients_on_both_sides_see_final_values():
    seen = []
    tokens = torch.ones(2, requires_grad=True)
    before = tokens * 1.0
    before.retain_grad()
    before.register_hook(lambda grad: seen.append(grad.tolist()))
    (arrived,) = send(before)
    arrived.retain_grad()
    arrived.register_hook(lambda grad: seen.append(grad.tolist()))
    arrived.sum().backward()
    assert seen == [[1.0, 1.0], [2.0, 2.0]]
    assert (arrived.grad.tolist(), before.grad.tolist()) == ([1.0, 1.0], [2.0, 2.0])


def test_gradients_of_gradients_are_refused():
    tokens = torch.ones(2, requires_grad=True)
    (arrived,) = send(tokens)
    (grad,) = torch.autograd.grad(arrived.square().sum(), tokens, create_graph=True)
    with pytest.raises(RuntimeError, match="differentiate twice"):
        grad.sum().backward()


def test_what_a_stream_still_reads_in_backward_is_kept_until_it_is_waited_for():
    saved = [torch.full((2,), 3.0)]
    exchange = OnLaunchStream(lambda tokens: (tokens * tokens * saved[0],))
    flight = Flight(torch.ones(2, requires_grad=True))
    flight.launch(exchange)
    (arrived,) = flight.arrive()
    assert arrived.tolist() == [3.0, 3.0]

    grad = torch.ones(2)
    inputs = [weakref.ref(tensor) for tensor in exchange._inputs]
    read = [weakref.ref(grad), weakref.ref(saved[0]), *inputs]
    exchange.launch_backward([grad])
    del grad
    saved.clear()  # as a dispatcher's state, which the next forward replaces
    gc.collect()
    assert all(tensor() is not None for tensor in read)
    (back,) = exchange.wait_backward()
    assert back.tolist() == [6.0, 6.0]
    gc.collect()
    assert all(tensor() is None for tensor in read[:2])


def test_a_second_backward_through_such_a_stream_is_refused_by_name():
    tokens = torch.ones(2, requires_grad=True)
    (arrived,) = send(tokens, exchange=OnLaunchStream(lambda tokens: (tokens * tokens,)))
    loss = arrived.sum()
    loss.backward(retain_graph=True)
    with pytest.raises(RuntimeError, match="--moe-token-dispatcher-type flex: a second backward"):
        loss.backward()
