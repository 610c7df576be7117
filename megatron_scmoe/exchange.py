"""The only module that touches streams, events and asynchronous collectives.

An *exchange* moves tensors between the expert-parallel ranks, in two halves:

    flight = depart(exchange, *tensors)   # launched; the caller computes something else
    tensors = flight.arrive()             # waited for

Each half is an autograd node of its own. Autograd runs the ready node that was created last, so the
forward's order is mirrored in backward: the backward of arrive launches the reverse exchange, every
backbone operator issued in between runs its backward, and only then the backward of depart waits.
The gradient travels from one node to the other as a buffer still being filled; nothing reads it on
the way, since each node is the other's only neighbour.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence

import torch
from torch import Tensor
from torch.distributed import ProcessGroup


class Exchange(ABC):
    """An exchange and its reverse, each in two halves."""

    @abstractmethod
    def launch(self, tensors: Sequence[Tensor]) -> None:
        """Start sending ``tensors``."""

    @abstractmethod
    def wait(self) -> tuple[Tensor, ...]:
        """What arrived for the tensors launched; compute issued from now on may read it."""

    @abstractmethod
    def launch_backward(self, grads: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """Start sending back the gradients of the output; returns buffers still being filled."""

    @abstractmethod
    def wait_backward(self, buffers: Sequence[Tensor]) -> tuple[Tensor, ...]:
        """The gradients of the input, given what :meth:`launch_backward` returned."""


class Flight:
    """Tensors between departure and arrival."""

    def __init__(self, exchange: Exchange, departed: tuple[Tensor, ...]):
        self._exchange = exchange
        self._departed = departed

    def arrive(self) -> tuple[Tensor, ...]:
        """Wait for the exchange and return what arrived, attached to the autograd graph."""
        departed, self._departed = self._departed, ()
        return _Arrive.apply(self._exchange, *departed)


class Landed:
    """A flight that needed none of this: the exchange was computed in line."""

    def __init__(self, tensors: tuple[Tensor, ...]):
        self._tensors = tensors

    def arrive(self) -> tuple[Tensor, ...]:
        """What arrived."""
        return self._tensors


def depart(exchange: Exchange, *tensors: Tensor) -> Flight:
    """Launch ``exchange`` with ``tensors``."""
    departed = _Depart.apply(exchange, *tensors)
    exchange.launch([tensor.detach() for tensor in departed])
    return Flight(exchange, departed)


class _Depart(torch.autograd.Function):
    """Forward: nothing. Backward: wait for the gradients under way."""

    @staticmethod
    def forward(ctx, exchange: Exchange, *tensors: Tensor):
        ctx.exchange = exchange
        return tuple(tensor.view_as(tensor) for tensor in tensors)

    @staticmethod
    def backward(ctx, *buffers: Tensor):
        return None, *ctx.exchange.wait_backward(buffers)


class _Arrive(torch.autograd.Function):
    """Forward: wait for the tensors under way. Backward: launch their gradients."""

    @staticmethod
    def forward(ctx, exchange: Exchange, *departed: Tensor):
        ctx.exchange = exchange
        return exchange.wait()

    @staticmethod
    def backward(ctx, *grads: Tensor):
        return None, *ctx.exchange.launch_backward(grads)


class AllToAll(Exchange):
    """The all-to-all of rows over a process group.

    Args:
        group: the expert-parallel group.
        output_splits: rows received from each rank; None for equal splits.
        input_splits: rows sent to each rank; None for equal splits.
    """

    def __init__(
        self,
        group: ProcessGroup,
        output_splits: list[int] | None,
        input_splits: list[int] | None,
    ):
        self.group = group
        self.output_splits = output_splits
        self.input_splits = input_splits
        self._outputs: list[Tensor] = []
        self._works: list[torch.distributed.Work] = []

    def launch(self, tensors):
        self._outputs = self._start(tensors, self.output_splits, self.input_splits)

    def wait(self):
        self._finish()
        outputs, self._outputs = self._outputs, []
        return tuple(outputs)

    def launch_backward(self, grads):
        return tuple(self._start(grads, self.input_splits, self.output_splits))

    def wait_backward(self, buffers):
        self._finish()
        return tuple(buffers)

    def _start(self, tensors, output_splits, input_splits) -> list[Tensor]:
        outputs = []
        for tensor in tensors:
            tensor = tensor.contiguous()
            rows = tensor.shape[0] if output_splits is None else sum(output_splits)
            output = tensor.new_empty((rows, *tensor.shape[1:]))
            work = torch.distributed.all_to_all_single(
                output, tensor, output_splits, input_splits, group=self.group, async_op=True
            )
            outputs.append(output)
            # The work keeps the input alive until it is waited for.
            self._works.append(work)
        return outputs

    def _finish(self) -> None:
        for work in self._works:
            work.wait()
        self._works = []


class SideStream(Exchange):
    """Any differentiable communication, run with its backward on a stream beside the compute.

    For dispatchers whose kernels block the stream they are issued on (DeepEP, HybridEP).

    Args:
        function: tensors -> tensors; it communicates on the current stream.
    """

    _stream: torch.cuda.Stream | None = None

    def __init__(self, function: Callable[..., tuple[Tensor, ...]]):
        self.function = function
        if SideStream._stream is None:
            SideStream._stream = torch.cuda.Stream()
        self._inputs: list[Tensor] = []
        self._outputs: tuple[Tensor, ...] = ()

    def launch(self, tensors):
        needs_graph = torch.is_grad_enabled()
        with self._beside(tensors):
            # A graph of its own, so that its backward can run on the side stream as a whole.
            with torch.set_grad_enabled(needs_graph):
                self._inputs = [t.requires_grad_(needs_graph) for t in tensors]
                self._outputs = self.function(*self._inputs)

    def wait(self):
        self._join(self._outputs)
        return tuple(output.detach() for output in self._outputs)

    def launch_backward(self, grads):
        with self._beside(grads):
            outputs = [output for output in self._outputs if output.requires_grad]
            grads = [g for g, output in zip(grads, self._outputs) if output.requires_grad]
            buffers = torch.autograd.grad(outputs, self._inputs, grads)
        self._inputs, self._outputs = [], ()
        return buffers

    def wait_backward(self, buffers):
        self._join(buffers)
        return tuple(buffers)

    def _beside(self, tensors):
        """The side stream, once the compute issued so far has produced ``tensors``."""
        self._stream.wait_stream(torch.cuda.current_stream())
        for tensor in tensors:
            tensor.record_stream(self._stream)
        return torch.cuda.stream(self._stream)

    def _join(self, tensors) -> None:
        current = torch.cuda.current_stream()
        current.wait_stream(self._stream)
        for tensor in tensors:
            tensor.record_stream(current)
