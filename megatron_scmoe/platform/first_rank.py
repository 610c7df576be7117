"""What the first rank alone finds out, told to all: of a file, every rank then has the same reading."""

from collections.abc import Callable

import torch


def ask_first_rank[Found](find: Callable[[], Found]) -> Found:
    """What ``find`` gives on the first rank, on every rank; all call this together.

    Args:
        find: called on the first rank alone; what it gives can be pickled.
    """
    if torch.distributed.get_world_size() == 1:
        return find()
    found: list = [find() if torch.distributed.get_rank() == 0 else None]
    torch.distributed.broadcast_object_list(found, src=0)
    answer: Found = found[0]
    return answer
