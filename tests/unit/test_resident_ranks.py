"""Ranks that serve many tests: each run is as in fresh processes, and a failure harms only its own."""

import os
import time

import pytest
import torch

from megatron_scmoe.platform.launch import free_port
from tests import harness, small_run
from tests.resident import RankFailure, ResidentRanks

pytestmark = pytest.mark.slow

FLAGS = [*small_run.MODEL, *small_run.STEPS, "--mock-data", "--train-iters", "5"]
EP2 = [*FLAGS, *small_run.EP2]


@pytest.fixture
def ranks():
    ranks = ResidentRanks(harness._context, 2)
    yield ranks
    ranks.close()


def pretrain(ranks, log, flags, world_size=2) -> harness.Run:
    task = (world_size, free_port(), flags, str(log))
    statuses = ranks.call(harness._status_of_pretrain, world_size, 120, *task)
    return harness.Run(max(statuses), log.read_text())


def test_runs_in_a_row_are_those_of_fresh_ranks(ranks, tmp_path):
    fresh = harness.run_pretrain(EP2, 2)
    saving = [*FLAGS, "--save", str(tmp_path / "saved")]
    alone = pretrain(ranks, tmp_path / "0", saving, world_size=1)
    assert alone.status == 0, alone.output
    assert (tmp_path / "saved" / "iter_0000005").is_dir()
    refused = pretrain(ranks, tmp_path / "1", [*EP2, "--scmoe-expert-slot", "9"])
    assert refused.status == 2
    first, again = (pretrain(ranks, tmp_path / name, EP2) for name in ("2", "3"))
    assert fresh.status == first.status == again.status == 0, first.output
    assert len(fresh.losses) == 5
    assert fresh.losses == first.losses == again.losses


def answer(rank, question):
    return rank, question, os.getpid()


def raise_on_first(rank):
    assert rank == 1, "this is the first"
    return rank


def hang_or_die(rank):
    if rank == 1:
        os._exit(3)
    time.sleep(1000)


def return_on_first(rank):
    if rank == 1:
        time.sleep(1000)
    return 1


def wait_for_the_other(rank, folder):
    torch.distributed.init_process_group(
        "gloo", init_method=f"file://{folder}/store", rank=rank, world_size=2
    )
    if rank == 1:
        raise ValueError("left alone")
    torch.distributed.barrier()


def test_a_task_runs_on_every_rank_and_the_processes_stay(ranks):
    [(first, _, pid), (second, _, _)] = ranks.call(answer, 2, 60, "a")
    assert (first, second) == (0, 1)
    assert ranks.call(answer, 1, 60, "b") == [(0, "b", pid)]


def test_a_failure_is_told_with_its_rank_and_traceback(ranks):
    pid = ranks.call(answer, 1, 60, "")[0][2]
    with pytest.raises(RankFailure, match=r"rank 0:\nTraceback(.|\n)*this is the first"):
        ranks.call(raise_on_first, 2, 60)
    assert ranks.call(answer, 1, 60, "")[0][2] == pid


def test_a_set_with_a_dead_or_waiting_rank_is_started_anew(ranks, tmp_path):
    ranks.PATIENCE_S = 1
    with pytest.raises(RankFailure, match=r"ranks \[0, 1\] died or were still at work"):
        ranks.call(hang_or_die, 2, 60)
    with pytest.raises(RankFailure, match=r"ranks \[1\] died or were still at work"):
        ranks.call(return_on_first, 2, 60, is_failure=lambda status: status == 1)
    with pytest.raises(RankFailure, match="left alone"):
        ranks.call(wait_for_the_other, 2, 60, str(tmp_path))
    assert [rank for rank, _, _ in ranks.call(answer, 2, 60, "")] == [0, 1]
