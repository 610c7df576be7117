"""The only module that touches streams, events and asynchronous collectives (but copy_engine/,
an all-to-all that is no collective).

An *exchange* moves tensors between the expert-parallel ranks:

    flight = Flight(tokens, probs)     # ready to leave; the caller may compute something else
    flight.launch(exchange)            # on its way; the caller computes something else
    tokens, probs = flight.arrive()    # waited for

Leaving and arriving are autograd nodes of their own. Autograd runs the ready node that was created
last, so the forward's order is mirrored in backward: the backward of arrive launches the reverse
exchange, every backbone operator issued in between runs its backward, and only then the backward of
leaving waits. Gradients under way never pass through autograd, where anomaly detection and hooks would
read them half-filled: the node that launches gives the other zeros without memory in their place.
Gradients of gradients would miss what went through an exchange; PyTorch refuses them
(``once_differentiable``).

The launch itself is no node. It may come later than the leaving, when the host has learned the
split sizes: it goes to a stream that waits for the moment of leaving only, so compute issued in
between does not hold the exchange back.

Which stream may read what until when. Memory belongs to the stream it was allocated on; the caching
allocator hands it out again on that stream as soon as the host drops the last reference.

    memory (belongs to)               is read and written by           is kept until
    tensors launched, and their       NCCL's streams, the copy         compute waits for the arrival
    gradients (compute)               engines' or the launch stream    (wait, wait_backward)
    copies of these, to make them     the same                         the same, and compute's work up
    contiguous (launch)                                                to there is done
    what arrives (launch)             the same, then compute           compute's last use is done
    what a graph of the launch        the launch stream, in backward   compute waits for the gradients
    stream saved (either)                                              that come back

The host enqueues that wait before it drops the reference, so memory of the compute stream is handed out
again behind it. Memory of the launch stream that compute depends on is marked with ``record_stream``:
the allocator then asks an event of the compute stream.
"""

import functools
import os
from abc import ABC, abstractmethod
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Literal, Protocol

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.distributed import ProcessGroup

from megatron_scmoe.config import AllToAllName
from megatron_scmoe.overlap.exchange_times import ExchangeRecorder, Moments
from megatron_scmoe.platform import cpu_backend


def can_launch_late() -> bool:
    """Whether an exchange launched after some compute can still run beside it.

    Not on the CPU, where compute is done when the call returns, and not with one hardware queue,
    which runs kernels in the order of their launches.
    """
    return not cpu_backend.is_enabled() and os.environ.get("CUDA_DEVICE_MAX_CONNECTIONS") != "1"


def now() -> torch.cuda.Event:
    """The moment when all that was enqueued for the compute is done."""
    return torch.cuda.current_stream().record_event()


def event_in_graph() -> torch.cuda.Event:
    """An event that, recorded while a CUDA graph is captured, happens in the midst of each replay."""
    return torch.cuda.Event(external=True)


@functools.cache
def _stream_beside() -> torch.cuda.Stream:
    """One for all: cuBLAS keeps a workspace for each stream, on some GPUs of 32 MiB."""
    return torch.cuda.Stream()


@contextmanager
def beside_compute() -> Iterator[None]:
    """Issue work on a stream of its own, behind what was enqueued; at the end the device is idle."""
    stream = _stream_beside()
    stream.wait_stream(torch.cuda.current_stream())
    try:
        with torch.cuda.stream(stream):
            yield
    finally:
        torch.cuda.synchronize()


class Exchange(ABC):
    """An exchange and its reverse, each in two halves."""

    @abstractmethod
    def launch(self, tensors: Sequence[Tensor]) -> None:
        """Start sending ``tensors``."""

    @abstractmethod
    def wait(self) -> tuple[Tensor, ...]:
        """What arrived for the tensors launched; compute issued from now on may read it."""

    @abstractmethod
    def launch_backward(self, grads: Sequence[Tensor]) -> None:
        """Start sending back the gradients of the output."""

    @abstractmethod
    def wait_backward(self) -> tuple[Tensor, ...]:
        """The gradients of the input; compute issued from now on may read them."""

    def record_arrival(self, event: torch.cuda.Event) -> None:
        """Record ``event`` when what was just launched has arrived; called where it was launched.

        This serves exchanges that are done when the launch stream is.
        """
        event.record()


class Flight:
    """Tensors on their way, from leaving to arrival.

    Args:
        tensors: what is to be exchanged; their values at this moment of the current stream count.
        ready: when their values are final, if that is earlier: inside a CUDA graph.
    """

    _exchange: Exchange  # once it is launched
    _moments: Moments | None = None  # of the latest launch, if it is recorded

    def __init__(self, *tensors: Tensor, ready: torch.cuda.Event | None = None):
        self._departed = _Depart.apply(self, *tensors)
        self._ready = ready or now()

    def launch(self, exchange: Exchange) -> None:
        """Start ``exchange`` as soon as the tensors are ready."""
        self._exchange = exchange
        tensors = [tensor.detach() for tensor in self._departed]
        with launch_stream(self._ready):
            self._moments = _launch(exchange, exchange.launch, tensors, is_backward=False)
        del self._ready

    def arrive(self) -> tuple[Tensor, ...]:
        """Wait for the exchange and return what arrived, attached to the autograd graph."""
        departed, self._departed = self._departed, ()
        return _Arrive.apply(self, *departed)


class CompletedExchange:
    """A flight that needed none of this: the exchange was computed in line."""

    def __init__(self, *tensors: Tensor):
        self._tensors = tensors

    def arrive(self) -> tuple[Tensor, ...]:
        """What arrived."""
        return self._tensors


_stream: torch.cuda.Stream | None = None


def launch_stream(ready: torch.cuda.Event):
    """The one stream that exchanges are launched from, once ``ready`` has happened."""
    global _stream
    if _stream is None:
        _stream = torch.cuda.Stream()
    _stream.wait_event(ready)
    return torch.cuda.stream(_stream)


class _Depart(torch.autograd.Function):
    """Forward: nothing. Backward: wait for the gradients under way."""

    @staticmethod
    def forward(ctx, flight: Flight, *tensors: Tensor):
        ctx.flight = flight
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    @once_differentiable
    def backward(ctx, *placeholders: Tensor):
        flight = ctx.flight
        return None, *_wait(flight._moments, flight._exchange.wait_backward)


class _Arrive(torch.autograd.Function):
    """Forward: wait for the tensors under way. Backward: launch their gradients."""

    @staticmethod
    def forward(ctx, flight: Flight, *departed: Tensor):
        ctx.flight = flight
        ctx.departed = [(tensor.shape, tensor.dtype, tensor.device) for tensor in departed]
        return _wait(flight._moments, flight._exchange.wait)

    @staticmethod
    @once_differentiable
    def backward(ctx, *grads: Tensor):
        exchange = ctx.flight._exchange
        with launch_stream(now()):
            ctx.flight._moments = _launch(
                exchange, exchange.launch_backward, grads, is_backward=True
            )
        return None, *(_placeholder(*kind) for kind in ctx.departed)


def _placeholder(shape: torch.Size, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Zeros of this shape, all of them one element."""
    return _zero(dtype, device).expand(shape)


@functools.cache
def _zero(dtype: torch.dtype, device: torch.device) -> Tensor:
    return torch.zeros((), dtype=dtype, device=device)


_recorder: ExchangeRecorder | None = None


def record_with(recorder: ExchangeRecorder | None) -> None:
    """Tell this recorder of all exchanges launched from now on; None: nobody."""
    global _recorder
    _recorder = recorder


def _launch(
    exchange: Exchange, launch: Callable, tensors: Sequence[Tensor], is_backward: bool
) -> Moments | None:
    """Launch, on the launch stream. Returns what :func:`_wait` takes, if exchanges are recorded."""
    if _recorder is None:
        launch(tensors)
        return None
    moments = _recorder.begins(is_backward)
    launch(tensors)
    # With one hardware queue, a stream that waits for the arrival would hold up the compute as well.
    if can_launch_late() or cpu_backend.is_enabled():
        exchange.record_arrival(moments.expect_arrival())
    return moments


def _wait(moments: Moments | None, wait: Callable[[], tuple[Tensor, ...]]) -> tuple[Tensor, ...]:
    """Wait, on the compute stream."""
    if moments is None:
        return wait()
    moments.reach()
    arrived = wait()
    moments.resume()
    return arrived


class Waitable(Protocol):
    """Work under way on the GPU: a collective, or copies."""

    def wait(self) -> object:
        """Let the current stream wait for it."""


class AllToAll(Exchange):
    """The all-to-all of rows over a process group.

    Args:
        group: the expert-parallel group.
        output_splits: rows received from each rank; None for equal splits.
        input_splits: rows sent to each rank; None for equal splits.
        name: which of a pair's two it is.
    """

    def __init__(
        self,
        group: ProcessGroup,
        output_splits: list[int] | None,
        input_splits: list[int] | None,
        name: Literal["dispatch", "combine"],
    ):
        self.group = group
        self.name = name
        self.output_splits = output_splits
        self.input_splits = input_splits
        self._outputs: list[Tensor] = []
        self._works: list[tuple[Waitable, Sequence[Tensor], Sequence[Tensor]]] = []

    def launch(self, tensors):
        self._outputs = self._start(self.name, tensors, self.output_splits, self.input_splits)

    def wait(self):
        return self._finish()

    def launch_backward(self, grads):
        name: AllToAllName = "dispatch-backward" if self.name == "dispatch" else "combine-backward"
        self._outputs = self._start(name, grads, self.input_splits, self.output_splits)

    def wait_backward(self):
        return self._finish()

    def record_arrival(self, event):
        if cpu_backend.is_enabled():  # gloo's own thread says so: a wait would stop the host
            for work, _, _ in self._works:
                work.get_future().add_done_callback(lambda _: event.record())  # type: ignore[attr-defined]
            return
        for work, _, _ in self._works:
            work.wait()
        event.record()

    def _start(self, name: AllToAllName, tensors, output_splits, input_splits) -> list[Tensor]:
        """Start the all-to-all of that name; returns buffers being filled."""
        outputs = []
        for tensor in tensors:
            rows = tensor.shape[0] if output_splits is None else sum(output_splits)
            output = tensor.new_empty((rows, *tensor.shape[1:]))
            source = tensor.contiguous()
            work = torch.distributed.all_to_all_single(
                output, source, output_splits, input_splits, group=self.group, async_op=True
            )
            outputs.append(output)
            self._works.append((work, [tensor], [source]))
        return outputs

    def _finish(self) -> tuple[Tensor, ...]:
        """Let the current stream wait, hand over what has arrived and drop what was sent."""
        current = torch.cuda.current_stream()
        for work, tensors, sources in self._works:
            work.wait()
            for tensor, source in zip(tensors, sources):
                if source is not tensor:
                    source.record_stream(current)
        self._works = []
        outputs, self._outputs = self._outputs, []
        for output in outputs:
            output.record_stream(current)
        return tuple(outputs)


class OnLaunchStream(Exchange):
    """Any differentiable communication, run with its backward on the launch stream.

    For dispatchers whose kernels block the stream they are issued on (DeepEP, HybridEP, NCCL EP).

    Args:
        function: tensors -> tensors; it communicates on the current stream.
    """

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]):
        self.function = function
        self._inputs: list[Tensor] = []
        self._outputs: tuple[Tensor, ...] = ()
        self._grads: Sequence[Tensor] = ()
        self._buffers: tuple[Tensor, ...] = ()

    def launch(self, tensors):
        # A graph of its own, so that its backward runs on the launch stream as a whole.
        needs_graph = torch.is_grad_enabled()
        self._inputs = [tensor.requires_grad_(needs_graph) for tensor in tensors]
        self._outputs = self.function(*self._inputs)

    def wait(self):
        return self._join([output.detach() for output in self._outputs])

    def launch_backward(self, grads):
        if not self._outputs:
            raise RuntimeError(
                "--moe-token-dispatcher-type flex: a second backward through the same forward; "
                "accepted: --moe-token-dispatcher-type alltoall"
            )
        self._grads = grads
        used = [index for index, output in enumerate(self._outputs) if output.requires_grad]
        self._buffers = torch.autograd.grad(
            [self._outputs[index] for index in used],
            self._inputs,
            [grads[index] for index in used],
            retain_graph=True,  # what it saved is still read by the stream
        )

    def wait_backward(self):
        buffers, self._buffers = self._buffers, ()
        arrived = self._join(buffers)
        self._inputs, self._outputs, self._grads = [], (), ()
        return arrived

    def _join(self, tensors) -> tuple[Tensor, ...]:
        current = torch.cuda.current_stream()
        assert _stream is not None  # it has launched what is waited for
        current.wait_stream(_stream)
        for tensor in tensors:
            tensor.record_stream(current)
        return tuple(tensors)
