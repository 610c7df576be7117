"""What ranks tell each other outside of collectives: before there is a process group, or past it."""

import functools
import os
from datetime import timedelta
from typing import Any

import torch
from torch.distributed.rendezvous import rendezvous

PREFIX = "scmoe"

Store = Any
"""A ``torch.distributed.Store``: PyTorch documents it, and exports no type."""


def connect(answer_s: float) -> Store:
    """A connection of its own to the store that the launcher or the first rank holds.

    Args:
        answer_s: how long it may take to answer.

    Raises:
        RuntimeError: if it does not, now or later.
    """
    store = torch.distributed.TCPStore(  # type: ignore[attr-defined]  # it is documented
        os.environ["MASTER_ADDR"],
        int(os.environ["MASTER_PORT"]),
        is_master=False,
        timeout=timedelta(seconds=answer_s),
        wait_for_workers=False,
    )
    return _ours(store)


def gather(question: str, answer: str) -> list[str]:
    """What each rank answers, by rank; to be called on all, before the process group is made.

    Args:
        question: a name that is used once.
    """
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    if ranks == 1:
        return [answer]
    store = _ours(_rendezvous())
    store.set(f"{question}/{rank}", answer)
    return [store.get(f"{question}/{other}").decode() for other in range(ranks)]


def _ours(store: Store) -> Store:
    """The part of the store that is ours, in this attempt: torchrun may restart the ranks beside it."""
    prefix = f"{PREFIX}/{os.environ.get('TORCHELASTIC_RESTART_COUNT', '0')}"
    return torch.distributed.PrefixStore(prefix, store)  # type: ignore[attr-defined]  # as above


@functools.cache
def _rendezvous() -> Store:
    """The store that the process group will take too; without a launcher's, the first rank makes it."""
    store, _, _ = next(iter(rendezvous("env://")))
    return store
