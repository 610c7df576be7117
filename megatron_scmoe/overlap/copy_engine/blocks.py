"""How the rows of an exchange are cut into blocks, the same on both sides."""

import itertools
from typing import NamedTuple

BLOCKS = 4
"""Blocks that an all-to-all is cut into on each rank, unless its peers or its size ask for more: enough
that both copies of different blocks run at once, few as each costs the host six calls."""

MIN_BLOCK_BYTES = 2**20
"""Smaller blocks would not pay their calls."""


class Block(NamedTuple):
    """Successive rows of what one rank sends another."""

    peer: int
    begin: int
    rows: int


def plan(splits: list[int], rank: int, least: int, most: int, step: int) -> list[list[Block]]:
    """The blocks of an exchange in turns: first one block of every peer, then the next of each.

    How the rows between two ranks are cut depends on their number alone, which both know. Every rank
    sends to the one after it first and receives from the one before it first, so that in each part of
    a turn every rank receives from one other.

    Args:
        splits: rows for (or of) each rank, in the order of the ranks.
        rank: the own, whose rows stay here.
        least: rows of a block, unless there are fewer.
        most: rows of a block at most.
        step: from one peer to the next: 1 to send, -1 to receive.
    """
    ranks = len(splits)
    begins = list(itertools.accumulate(splits, initial=0))
    each = max(1, BLOCKS // (ranks - 1))
    turns: list[list[Block]] = []
    for distance in range(1, ranks):
        peer = (rank + step * distance) % ranks
        count = splits[peer]
        blocks = max(-(-count // most), min(each, count // least), 1)
        rows = max(1, -(-count // blocks))
        for turn, offset in enumerate(range(0, count, rows)):
            if turn == len(turns):
                turns.append([])
            turns[turn].append(Block(peer, begins[peer] + offset, min(rows, count - offset)))
    return turns
