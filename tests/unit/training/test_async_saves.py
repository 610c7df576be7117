"""The process that writes asynchronously and its rank end together."""

import pickle
from functools import partial
from multiprocessing import JoinableQueue
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from megatron.core.dist_checkpointing.strategies import async_utils

from megatron_scmoe.training import async_saves
from megatron_scmoe.training.failed_saves import SaveError


@pytest.fixture
def writer(monkeypatch):
    """A writer's process, which can be ended."""
    process = SimpleNamespace(exitcode=None, is_alive=lambda: process.exitcode is None)
    monkeypatch.setattr(async_utils.PersistentAsyncCaller, "_persistent_process", process)
    return process


def test_what_training_changes_afterwards_is_not_written():
    weight = torch.zeros(3)
    bucket = (Path("shard"), "shard", ([("object", b"0")], [("weight", weight)]))

    [(file, key, (objects, tensors))] = async_saves.copied_to_host([bucket])
    weight += 1  # the next step

    assert (file, key, objects) == (Path("shard"), "shard", [("object", b"0")])
    assert [(name, tensor.tolist()) for name, tensor in tensors] == [("weight", [0, 0, 0])]


def test_the_writer_gets_that_copy_by_its_name():
    """It is another process, which has Megatron's own method in its class."""
    asked = pickle.loads(pickle.dumps(partial(async_saves.copied_to_host, [], True)))
    assert asked.func is async_saves.copied_to_host


def test_work_is_given_to_a_living_writer_only(writer):
    given = []
    schedule = async_saves._with_a_living_writer(lambda self, request: given.append(request))

    schedule(None, "save 3")
    writer.exitcode = -9
    with pytest.raises(SaveError, match="of rank 0 has ended with status -9"):
        schedule(None, "save 6")
    assert given == ["save 3"]


def test_a_writer_that_ends_while_it_copies_is_not_waited_for(writer):
    copied = JoinableQueue()

    def wait_for_the_copy(self, request):
        copied.put(request)
        writer.exitcode = -9
        copied.join()

    schedule = async_saves._with_a_living_writer(wait_for_the_copy)
    with pytest.raises(SaveError, match="has ended with status -9"):
        schedule(SimpleNamespace(_persistent_preload_q=copied), "save 3")


def test_waiting_ends_with_the_writer(writer):
    asked = []

    def is_done(self, blocking, no_dist):
        asked.append(blocking)
        if len(asked) == 3:
            writer.exitcode = 1
        return False

    wait = async_saves._without_waiting_for_ever(is_done)
    with pytest.raises(SaveError, match="has ended with status 1"):
        wait(None, blocking=True)
    assert asked == [False, False, False]


def test_waiting_ends_when_all_ranks_are_done(writer):
    answers = iter([False, False, True])
    wait = async_saves._without_waiting_for_ever(lambda self, blocking, no_dist: next(answers))
    assert not wait(None, blocking=False)
    assert wait(None, blocking=True)
    assert next(answers, None) is None
