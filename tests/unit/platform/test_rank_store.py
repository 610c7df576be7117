"""Ranks hear what the others answer, with no process group."""

import os

import torch

from megatron_scmoe.platform import rank_store
from tests.harness import run_distributed


def ask() -> tuple[list[str], str]:
    rank = os.environ["RANK"]
    store = rank_store._ours(_store_of_the_group())
    rank_store._rendezvous = _store_of_the_group
    store.set("word", "heard")
    return rank_store.gather("question", f"answer of {rank}"), store.get("word").decode()


def _store_of_the_group():
    from torch.distributed import distributed_c10d

    return distributed_c10d._get_default_store()


def test_all_ranks_hear_all_answers():
    answers = ["answer of 0", "answer of 1"]
    assert run_distributed(ask, 2) == [(answers, "heard"), (answers, "heard")]


def test_what_ranks_said_before_a_restart_is_forgotten(monkeypatch):
    store = torch.distributed.HashStore()
    rank_store._ours(store).set("beat/0", "old")
    monkeypatch.setenv("TORCHELASTIC_RESTART_COUNT", "1")
    assert not rank_store._ours(store).check(["beat/0"])


def test_one_rank_hears_itself(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert rank_store.gather("question", "answer") == ["answer"]
