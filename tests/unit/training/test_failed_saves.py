"""A save that fails is one line: rank, cause, and where training goes on."""

import errno
import logging
import os

import pytest
from torch.distributed.checkpoint.api import CheckpointException

from megatron_scmoe.training.failed_saves import SaveError, told_in_one_line


def told(folder, act) -> str:
    with pytest.raises(SaveError) as caught, told_in_one_line(str(folder)):
        act()
    assert caught.value.status == 1
    assert "\n" not in str(caught.value)
    return str(caught.value)


def raising(error: BaseException, logged: str | None = None):
    def act():
        if logged is not None:
            name = "megatron.core.dist_checkpointing.strategies.filesystem_async"
            logging.getLogger(name).error(logged)
        raise error

    return act


FAILED = CheckpointException(
    "write", {0: (RuntimeError("Worker failure: <class 'OSError'>"), None)}
)


def test_the_cause_is_the_one_that_the_writer_logged(tmp_path):
    logged = "Local worker 0 encountered an error: [Errno 28] No space left on device"
    message = told(tmp_path, raising(FAILED, logged))
    assert message.startswith(
        f"--save {tmp_path}: rank 0 could not write its part of a checkpoint ("
    )
    assert "([Errno 28] No space left on device, " in message
    assert message.endswith(" GB are free there); there is no complete checkpoint yet")


def test_what_pytorch_says_of_a_write_that_was_cut_short_is_put_in_words(tmp_path):
    logged = "an error: [enforce fail at inline_container.cc:672] . unexpected pos 704 vs 598"
    assert "(a write was cut short, as by a full disk, " in told(
        tmp_path, raising(FAILED, f"x {logged}")
    )


def test_without_a_log_it_is_what_was_raised(tmp_path):
    assert "(Worker failure: <class 'OSError'>, " in told(tmp_path, raising(FAILED))


def test_the_first_rank_is_told_of_the_others(tmp_path):
    failed = CheckpointException("write", {1: (RuntimeError("Worker failure"), None)})
    assert "rank 1 could not write its part of a checkpoint (Worker failure, " in (
        told(tmp_path, raising(failed))
    )


@pytest.mark.parametrize("number", [errno.ENOSPC, errno.EDQUOT, errno.EIO])
def test_an_error_of_the_disk(number, tmp_path):
    message = told(tmp_path, raising(OSError(number, os.strerror(number))))
    assert f"rank 0 could not write its part of a checkpoint ({os.strerror(number)}, " in message


def test_other_errors_are_left_alone(tmp_path):
    failed_load = CheckpointException("read", {})
    for error in (failed_load, OSError(errno.ENOENT, "no file", "elsewhere"), ValueError("a bug")):
        with pytest.raises(type(error)) as caught, told_in_one_line(str(tmp_path)):
            raise error
        assert caught.value is error


def test_where_nothing_is_saved_nothing_is_explained():
    with pytest.raises(OSError, match="No space"), told_in_one_line(None):
        raise OSError(errno.ENOSPC, "No space left on device")
