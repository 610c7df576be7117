"""The blocks of an all-to-all by copy engines; the copies themselves need GPUs (tests/gpu)."""

import itertools

from megatron_scmoe.overlap.copy_engine.blocks import BLOCKS, plan
from megatron_scmoe.overlap.copy_engine.rings import RING_BYTES, SLOTS, _reached

MOST = 4  # rows of a block


def test_sender_and_receiver_cut_the_same_blocks():
    """What goes from one rank to another is cut alike on both sides, wherever it lies in each."""
    matrix = [[3, 0, 17], [5, 9, 1], [40, 2, 0]]  # rows from (outer) to (inner)
    for source, target in itertools.permutations(range(3), 2):
        received = [row[target] for row in matrix]
        sends = plan(matrix[source], source, 1, MOST, 1)
        receives = plan(received, target, 1, MOST, -1)
        for turn in range(max(len(sends), len(receives))):
            sent = _sizes(sends, turn, target)
            assert sent == _sizes(receives, turn, source), (source, target, turn)


def _sizes(turns, turn, peer):
    return [block.rows for block in itertools.chain(*turns[turn : turn + 1]) if block.peer == peer]


def test_blocks_cover_every_row_that_leaves_once():
    splits = [3, 0, 17, 8]
    covered = [0] * sum(splits)
    for block in itertools.chain(*plan(splits, 3, 1, MOST, 1)):
        assert 0 < block.rows <= MOST
        for row in range(block.begin, block.begin + block.rows):
            covered[row] += 1
    assert covered == [1] * 20 + [0] * 8


def test_large_messages_are_cut_in_a_few_blocks():
    """Enough to copy two at once, few since each costs the host time."""
    assert len(plan([0, 16384], 0, 1, 16384, 1)) == BLOCKS
    assert len(plan([0, 100], 0, 256, 16384, 1)) == 1
    among_eight = plan([0] + [16384] * 7, 0, 1, 16384, 1)
    assert [len(turn) for turn in among_eight] == [7]
    among_four = plan([0] + [16384] * 3, 0, 1, 16384, 1)
    assert [len(turn) for turn in among_four] == [3]


def test_turns_take_one_block_of_each_peer():
    turns = plan([10, 1, 5], 1, 4, MOST, 1)
    assert [[block.peer for block in turn] for turn in turns] == [[2, 0], [2, 0], [0]]


def test_at_any_time_each_rank_receives_from_one_other():
    """All sending to the same rank first would leave the others' links idle."""
    ranks = range(5)
    sends = [plan([1] * 5, rank, 1, MOST, 1)[0] for rank in ranks]
    receives = [plan([1] * 5, rank, 1, MOST, -1)[0] for rank in ranks]
    for place in range(4):
        assert sorted(sends[rank][place].peer for rank in ranks) == list(ranks)
        for rank in ranks:
            assert receives[sends[rank][place].peer][place].peer == rank


def test_nothing_to_send():
    assert plan([0, 4], 1, 1, MOST, 1) == []
    assert plan([0, 0], 0, 1, MOST, 1) == []


def test_memory_of_the_rings_grows_with_the_ranks_not_their_square():
    for ranks in (2, 4, 8):
        block = RING_BYTES // SLOTS // ranks
        assert ranks * SLOTS * block <= RING_BYTES
        assert block >= 2**20


def test_counters_are_compared_cyclically():
    assert _reached(5, 5) and _reached(6, 5) and not _reached(4, 5)
    assert _reached(0, -2), "the first blocks wait for nothing"
    assert _reached(3, 2**32 - 1) and not _reached(2**32 - 1, 2**32 + 3)
