"""The blocks of an all-to-all by copy engines; the copies themselves need GPUs (tests/gpu)."""

import itertools

from megatron_scmoe.copy_engine import BLOCKS, RING_BYTES, SLOTS, plan

ROW, SLOT = 2400, 10000  # bytes; a slot holds no whole number of rows


def test_sender_and_receiver_cut_the_same_blocks():
    """What goes from one rank to another is cut alike on both sides, wherever it lies in each."""
    matrix = [[3, 0, 17], [5, 9, 1], [40, 2, 0]]  # rows from (outer) to (inner)
    for source, target in itertools.permutations(range(3), 2):
        received = [row[target] for row in matrix]
        sends = plan(matrix[source], ROW, source, SLOT)
        receives = plan(received, ROW, target, SLOT)
        for turn in range(max(len(sends), len(receives))):
            sent = _sizes(sends, turn, target)
            assert sent == _sizes(receives, turn, source), (source, target, turn)


def _sizes(turns, turn, peer):
    return [block.size for block in itertools.chain(*turns[turn : turn + 1]) if block.peer == peer]


def test_blocks_cover_every_row_that_leaves_once():
    splits = [3, 0, 17, 8]
    covered = [0] * (sum(splits) * ROW)
    for block in itertools.chain(*plan(splits, ROW, 3, SLOT)):
        assert 0 < block.size <= SLOT
        for byte in range(block.begin, block.begin + block.size):
            covered[byte] += 1
    assert covered == [1] * (20 * ROW) + [0] * (8 * ROW)


def test_large_messages_are_cut_in_a_few_blocks():
    """Enough to copy two at once, few since each costs the host time."""
    gigabyte = 2**30
    assert len(plan([0, 64 * 2**20], 1, 0, gigabyte)) == BLOCKS
    assert len(plan([0, 100], 1, 0, gigabyte)) == 1
    among_eight = plan([0] + [64 * 2**20] * 7, 1, 0, gigabyte)
    assert [len(turn) for turn in among_eight] == [7]


def test_turns_take_one_block_of_each_peer():
    turns = plan([10, 1, 5], ROW, 1, SLOT)
    assert [[block.peer for block in turn] for turn in turns] == [[0, 2], [0, 2], [0]]


def test_nothing_to_send():
    assert plan([0, 4], ROW, 1, SLOT) == []
    assert plan([0, 0], ROW, 0, SLOT) == []


def test_memory_of_the_rings_grows_with_the_ranks_not_their_square():
    for ranks in (2, 4, 8):
        block = RING_BYTES // SLOTS // ranks
        assert ranks * SLOTS * block <= RING_BYTES
        assert block >= 2**20
