"""The all-to-all of a group by copy engines, all of it or in part."""

import functools
from collections.abc import Callable, Collection, Sequence
from functools import partial
from typing import get_args

import torch
from torch import Tensor
from torch.distributed import ProcessGroup

from megatron_scmoe.config import AllToAllName
from megatron_scmoe.overlap.async_all_to_all import AllToAll
from megatron_scmoe.overlap.copy_engine.rings import CopyEngines, Memory


def by_copy_engines(
    group: ProcessGroup, memory: Memory, chosen: Collection[AllToAllName] | None
) -> Callable[..., AllToAll]:
    """What makes a group's all-to-alls; the engines are made at the first call, by all its ranks.

    Args:
        group: the expert-parallel group.
        memory: where the slots lie.
        chosen: names of the all-to-alls that the engines carry; None for all.

    Raises:
        CopyEngineError: see :class:`CopyEngines`.
    """
    copied = frozenset(get_args(AllToAllName) if chosen is None else chosen)
    return partial(CopyEngineAllToAll, _engines_of(group, memory), copied)


@functools.cache
def _engines_of(group: ProcessGroup, memory: Memory) -> CopyEngines:
    """The engines of a group, which all its layers share as long as the process lives."""
    return CopyEngines(group, memory)


class CopyEngineAllToAll(AllToAll):
    """``AllToAll`` (async_all_to_all.py) by copy engines, or in part by the collective.

    Args:
        engines: of the group.
        copied: names of the all-to-alls that the engines carry.
    """

    def __init__(self, engines: CopyEngines, copied: Collection[AllToAllName], *args):
        super().__init__(*args)
        self.engines = engines
        self.copied = copied

    def _start(self, name, tensors, output_splits, input_splits) -> list[Tensor]:
        if name not in self.copied:
            return super()._start(name, tensors, output_splits, input_splits)
        sources = [tensor.contiguous() for tensor in tensors]
        equal = [tensors[0].shape[0] // self.engines.size] * self.engines.size
        received, sent = output_splits or equal, input_splits or equal
        outputs = [tensor.new_empty((sum(received), *tensor.shape[1:])) for tensor in tensors]
        events = self.engines.exchange(list(zip(sources, outputs, strict=True)), sent, received)
        self._works.append((_Copies(events), tensors, sources))
        return outputs


class _Copies:
    """Copies under way, to be waited for as for PyTorch's collectives."""

    def __init__(self, events: Sequence[torch.cuda.Event]):
        self._events = events

    def wait(self) -> None:
        """Let the current stream wait, for the sent rows too: their memory may be reused then."""
        for event in self._events:
            torch.cuda.current_stream().wait_event(event)
