"""Experts on the device: those on their way, those in use, those used lately."""

from collections import Counter
from collections.abc import Sequence
from concurrent.futures import Future
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from megatron_scmoe.inference.expert_store import HostExperts, Key, Packing
from megatron_scmoe.overlap.async_all_to_all import now
from megatron_scmoe.overlap.copy_engine.host_copies import HostCopies

Policy = Literal["lru", "frequency"]
"""Which expert makes room for another: the one not used for longest, or the one used least often."""


@dataclass
class Counts:
    """What a cache has done so far."""

    uses: int = 0
    hits: int = 0
    """Uses of an expert that was there, or on its way for an earlier use."""
    copied_bytes: int = 0


class ExpertCache:
    """Memory for a number of experts, and the copies that fill it.

    Experts are requested as soon as they are known, and used in the order of the request::

        cache.request(keys)             # copies begin; compute goes on
        for key in keys:
            weights = cache.take(key)   # compute waits for this one's copy
            ...                         # compute that reads the weights
            cache.release(key)

    Args:
        packing: how an expert lies in memory.
        slots: how many there is memory for.
        host: where they come from.
        policy: see :data:`Policy`.
    """

    def __init__(self, packing: Packing, slots: int, host: HostExperts, policy: Policy = "lru"):
        memory = torch.empty(slots, packing.nbytes, dtype=torch.uint8, device="cuda")
        self.nbytes = memory.nbytes
        self._free = [_Slot(row, list(packing.views(row).values())) for row in memory]
        self._held: dict[Key, _Slot] = {}  # the one not used for longest first
        self._host = host
        self._copies = HostCopies()
        self._policy = policy
        self._used: Counter[Key] = Counter()
        self.counts = Counts()

    def request(self, keys: Sequence[Key]) -> bool:
        """Start copies of what is not here, in order, as far as the memory goes.

        Experts of this request do not make room for each other, all others do.

        Returns:
            Whether all are here or on their way.
        """
        wanted = set(keys)
        for key in keys:
            if key in self._held:
                continue
            slot = self._make_room(wanted)
            if slot is None:
                return False
            self._host.announce(key)
            slot.copy = self._copies.start(slot.memory, self._host.row(key), slot.last_read)
            slot.is_new = True
            self._held[key] = slot
            self.counts.copied_bytes += slot.memory.nbytes
        return True

    def take(self, key: Key) -> list[Tensor]:
        """An expert's weights, in the order of the packing, for compute issued from now on."""
        if key not in self._held:
            self.request([key])
        slot = self._held[key] = self._held.pop(key)
        self.counts.uses += 1
        self.counts.hits += not slot.is_new
        self._used[key] += 1
        slot.is_new = False
        if slot.copy is not None:
            self._copies.wait(slot.copy)
            slot.copy = None
        return slot.weights

    def release(self, key: Key) -> None:
        """What reads the weights has been issued; behind it others may take their place."""
        self._held[key].last_read = now()

    def waited_ms(self) -> float:
        """How long compute has waited for copies so far."""
        return self._copies.waited_ms()

    def _make_room(self, wanted: set[Key]) -> "_Slot | None":
        """A slot that none of ``wanted`` is in; None if they are in all."""
        if self._free:
            return self._free.pop()
        others = [key for key in self._held if key not in wanted]
        if not others:
            return None
        frequent = self._policy == "frequency"
        return self._held.pop(min(others, key=self._used.__getitem__) if frequent else others[0])


@dataclass(eq=False)
class _Slot:
    """Memory of one expert."""

    memory: Tensor
    weights: list[Tensor]
    copy: "torch.cuda.Event | Future | None" = None
    """What fills it, if that was not waited for yet."""
    last_read: torch.cuda.Event | None = None
    is_new: bool = False
    """Whether what is in it was not used yet."""
