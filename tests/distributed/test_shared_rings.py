"""The memory that copy engines share between ranks. Pinning it and copying need GPUs (tests/gpu)."""

from pathlib import Path

import pytest
import torch

from megatron_scmoe import copy_engine
from tests.harness import run_distributed

pytestmark = pytest.mark.skipif(copy_engine.driver is None, reason="needs cuda-bindings")


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


class _Unpinned(copy_engine.CopyEngines):
    """Engines without a GPU: of their construction, what comes before pinning."""

    def __init__(self):
        self.group, self.memory = torch.distributed.group.WORLD, "host"
        self.rank, self.size = self.group.rank(), self.group.size()

    def _pin(self, address: int, size: int) -> int:
        return address


class _RefusedOnOneRank(_Unpinned):
    def _pin(self, address: int, size: int) -> int:
        if self.rank == 1:
            raise RuntimeError("the driver refused")
        return address


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
        except copy_engine.CopyEngineError as error:
            errors.append(str(error))
    torch.distributed.barrier()
    return *errors, _files()


def _files() -> list[str]:
    return [path.name for path in Path("/dev/shm").glob("megatron_scmoe-*")]
