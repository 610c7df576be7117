"""Copy engines without GPUs: the memory that ranks share, and the exchanges through it.

What a GPU's front end and copy engines do with a stream is done here by a thread: copies, waits for
counters and writes of counters, in order. Blocks, rings and counters are the real ones, between
processes. Pinning, and the driver itself, need GPUs (tests/gpu).
"""

import ctypes
import hashlib
import random
import threading
import time
from collections import Counter
from functools import partial
from pathlib import Path
from queue import SimpleQueue
from typing import ClassVar, get_args

import pytest
import torch

from megatron_scmoe.config import AllToAllName, ScMoEConfig
from megatron_scmoe.overlap.copy_engine import rings
from megatron_scmoe.overlap.copy_engine.exchange import CopyEngineAllToAll
from tests import models
from tests.harness import run_distributed

ALL_TO_ALLS, STEPS = get_args(AllToAllName), 2

pytestmark = pytest.mark.skipif(rings.driver is None, reason="needs cuda-bindings")


def test_ranks_map_the_same_memory_and_leave_nothing_behind():
    for seen, left in run_distributed(_share, 2):
        assert seen == [7, 8]
        assert left == []


def test_what_fails_on_one_rank_is_said_by_all():
    no_room, not_pinned, left = zip(*run_distributed(_fail, 2), strict=True)
    assert len(set(no_room)) == len(set(not_pinned)) == 1
    assert "--scmoe-exchange copy-host: " in no_room[0] and "No space left" in no_room[0]
    assert "the driver refused" in not_pinned[0]
    assert left == ([], [])


@pytest.mark.parametrize("ranks", [2, 3])
@pytest.mark.parametrize("queues", ["a queue of each stream", "one queue for both"])
def test_exchanges_move_every_row_to_its_place(ranks, queues):
    """Streams may share a hardware queue, which works in order: that must not end in a deadlock."""
    for found in run_distributed(_exchange, ranks, queues == "one queue for both"):
        assert found == []


@pytest.mark.parametrize("chunks", [1, 2])
def test_copied_and_collective_all_to_alls_train_bit_identically(chunks):
    """Whichever all-to-alls the copy engines carry, and no others."""
    for found in run_distributed(_train, 2, chunks):
        assert {copied: counts for copied, (counts, _) in found.items()} == {
            copied: {name: STEPS * chunks * (name in copied) for name in ALL_TO_ALLS}
            for copied in found
        }
        assert len({digest for _, digest in found.values()}) == 1


class _OnThreads(rings.CopyEngines):
    """Engines without a GPU, which need not pin their memory."""

    def _pin(self, address: int, size: int) -> int:
        return address


class _Unpinned(_OnThreads):
    """Of their construction, what comes before pinning."""

    def __init__(self):
        self.group, self.memory = torch.distributed.group.WORLD, "host"
        self.rank, self.size = self.group.rank(), self.group.size()


class _RefusedOnOneRank(_Unpinned):
    def _pin(self, address: int, size: int) -> int:
        if self.rank == 1:
            raise RuntimeError("the driver refused")
        return address


class _InOrder(_OnThreads):
    """Engines for a CPU, which has no streams that could wait: exchanges are through at once."""

    exchanges = 0

    def exchange(self, *args):
        self.exchanges += 1
        events = super().exchange(*args)
        rings.driver.synchronize()
        return events


class _Counting(CopyEngineAllToAll):
    """Counts what the engines carry, by name."""

    carried: ClassVar[Counter] = Counter()

    def _start(self, name, *args):
        before = self.engines.exchanges
        outputs = super()._start(name, *args)
        self.carried[name] += self.engines.exchanges - before
        return outputs


def _train(chunks: int) -> dict[tuple[str, ...], tuple[dict[str, int], str]]:
    """What was carried, and a digest of losses and gradients, by what was to be carried."""
    rings.driver = _FrontEnd(one_queue=False)
    found = {}
    for copied in (ALL_TO_ALLS, (), ALL_TO_ALLS[2:], ("dispatch", *ALL_TO_ALLS[2:]), ("combine",)):
        layout = models.LAYOUTS["EP2"]
        scmoe = ScMoEConfig(chunks=chunks)
        (model,) = models.build_scmoe(scmoe, layout, num_layers=2)
        engines = _InOrder(torch.distributed.group.WORLD, "host")
        for module in model.modules():
            for dispatcher in getattr(module, "token_dispatchers", ()):
                dispatcher.exchange = partial(_Counting, engines, copied)
        _Counting.carried.clear()
        digest = hashlib.sha256()
        for step in range(STEPS):
            batch = models.batch(2 * step + engines.rank)
            loss, gradients = models.loss_and_gradients(model, *batch)
            for tensor in (loss, *(gradients[name] for name in sorted(gradients))):
                digest.update(tensor.numpy().tobytes())
        counts = {name: _Counting.carried[name] for name in ALL_TO_ALLS}
        found[copied] = counts, digest.hexdigest()
    return found


def _share() -> tuple[list[int], list[str]]:
    engines = _Unpinned()
    engines._share(2**20)
    shared = torch.tensor([], dtype=torch.uint8).set_(engines._memory)
    shared[engines.rank] = 7 + engines.rank
    torch.distributed.barrier()
    seen = shared[:2].tolist()
    torch.distributed.barrier()
    return seen, _files()


def _fail() -> tuple[str, str, list[str]]:
    errors = []
    for engines, size in ((_Unpinned(), 2**45), (_RefusedOnOneRank(), 2**20)):
        try:
            engines._share(size)
        except rings.CopyEngineError as error:
            errors.append(str(error))
    torch.distributed.barrier()
    return *errors, _files()


def _files() -> list[str]:
    return [path.name for path in Path("/dev/shm").glob("megatron_scmoe-*")]


class _FrontEnd:
    """The driver's calls that exchanges are made of."""

    CUDA_SUCCESS = rings.driver and rings.driver.CUresult.CUDA_SUCCESS

    def __init__(self, one_queue: bool):
        self.one_queue, self.queues = one_queue, []

    def CUstream(self, _) -> SimpleQueue:
        if not (self.queues and self.one_queue):
            self.queues.append(SimpleQueue())
            threading.Thread(target=self._work, args=[self.queues[-1]], daemon=True).start()
        return self.queues[-1]

    def cuMemcpyAsync(self, target: int, source: int, size: int, queue: SimpleQueue):
        queue.put(lambda: ctypes.memmove(target, source, size))
        return (self.CUDA_SUCCESS,)

    def cuStreamWaitValue32(self, queue: SimpleQueue, address: int, value: int, flags: int):
        counter = ctypes.c_uint32.from_address(address)

        def wait() -> None:
            while (counter.value - value) % 2**32 >= 2**31:
                time.sleep(0)

        queue.put(wait)
        return (self.CUDA_SUCCESS,)

    def cuStreamWriteValue32(self, queue: SimpleQueue, address: int, value: int, flags: int):
        queue.put(lambda: setattr(ctypes.c_uint32.from_address(address), "value", value))
        return (self.CUDA_SUCCESS,)

    def synchronize(self) -> None:
        for queue in self.queues:
            done = threading.Event()
            queue.put(done.set)
            assert done.wait(60), "a deadlock"

    def _work(self, queue: SimpleQueue) -> None:
        while True:
            queue.get()()


def _exchange(one_queue: bool) -> list[str]:
    """What arrived wrongly: exchanges of many sizes, three at a time, through rings of few rows."""
    group = torch.distributed.group.WORLD
    rank, size = group.rank(), group.size()
    rings.driver = front_end = _FrontEnd(one_queue)
    rings.RING_BYTES, rings.MIN_BLOCK_BYTES = 3 * size * 4096, 256
    engines = _OnThreads(group, "host")
    draw = random.Random(0)
    wrong = []
    for number in range(12):
        kept = []
        for _ in range(3):
            rows = [[draw.choice([0, 1, 7, 90, 400]) for _ in range(size)] for _ in range(size)]
            sent, received = rows[rank], [row[rank] for row in rows]
            tokens = torch.randn(sum(sent), 24)
            pairs = []
            for source in (tokens, tokens[:, 0].contiguous()):
                expected = source.new_empty(sum(received), *source.shape[1:])
                torch.distributed.all_to_all_single(expected, source, received, sent)
                pairs.append((source, torch.empty_like(expected), expected))
            engines.exchange([pair[:2] for pair in pairs], sent, received)
            kept.append(pairs)
        front_end.synchronize()
        wrong += [
            f"exchange {number}: {tuple(output.shape)}"
            for pairs in kept
            for _, output, expected in pairs
            if not torch.equal(output, expected)
        ]
    torch.distributed.barrier()
    return wrong
