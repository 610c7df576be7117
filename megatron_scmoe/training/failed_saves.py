"""What stops a save, in one line that names the rank, the cause and the checkpoint that is left."""

import contextlib
import errno
import logging
import os
import shutil
from collections.abc import Iterator

import torch
from torch.distributed.checkpoint.api import CheckpointException

from megatron_scmoe.checkpoints.locate import RELEASE, last_complete
from megatron_scmoe.errors import ScMoEError


class SaveError(ScMoEError):
    """A checkpoint could not be written; the one before it is whole."""

    status = 1


@contextlib.contextmanager
def told_in_one_line(folder: str | None) -> Iterator[None]:
    """Say why a save failed, in place of the traces of PyTorch's threads and planners.

    Args:
        folder: what ``--save`` names; nothing is caught if it is None.

    Raises:
        SaveError: on every rank, if a rank could not write its shard; on the first rank, which
            writes alone what belongs to none, if that failed.
    """
    if folder is None:
        yield
        return
    with _reasons() as reasons:
        try:
            yield
        except CheckpointException as error:
            if not _is_of_a_save(error):
                raise
            raise SaveError(_describe(folder, *_first(_known_reason(error, reasons)))) from error
        except OSError as error:
            if not _is_of_the_disk(error, folder):
                raise
            rank = int(os.environ.get("RANK", "0"))
            raise SaveError(_describe(folder, rank, error.strerror or str(error))) from error


def _is_of_a_save(error: CheckpointException) -> bool:
    """The step, as Megatron names it once all ranks have written."""
    return error.args[0] == "write"


_OF_A_DISK = {errno.ENOSPC, errno.EDQUOT, errno.EFBIG, errno.EIO, errno.EROFS, errno.ESTALE}


def _is_of_the_disk(error: OSError, folder: str) -> bool:
    """A write that fails names no file."""
    named = error.filename is not None and str(error.filename).startswith(folder)
    return named or error.errno in _OF_A_DISK


@contextlib.contextmanager
def _reasons() -> Iterator[list[str]]:
    """What writers log of their errors: what they raise has only the type."""
    heard: list[str] = []

    class Handler(logging.Handler):
        def emit(self, record: logging.LogRecord) -> None:
            heard.append(record.getMessage().rpartition(" an error: ")[2])

    handler = Handler(logging.ERROR)
    writers = [logging.getLogger(name) for name in _WRITERS]
    for writer in writers:
        writer.addHandler(handler)
    try:
        yield heard
    finally:
        for writer in writers:
            writer.removeHandler(handler)


_WRITERS = (
    "megatron.core.dist_checkpointing.strategies.filesystem_async",
    "nvidia_resiliency_ext.checkpointing.async_ckpt.filesystem_async",
)


def _known_reason(error: CheckpointException, reasons: list[str]) -> tuple[int, str] | None:
    """A rank and what failed on it, as far as this one knows; the first rank is told of all.

    A process that writes asynchronously has logged its reason elsewhere.
    """
    rank = torch.distributed.get_rank()
    if not reasons and not error.failures:
        return None
    if not reasons:
        rank = min(error.failures)
    reason = reasons[0] if reasons else str(error.failures[rank][0]).strip()
    if "unexpected pos" in reason:  # PyTorch's archives do not say why
        reason = "a write was cut short, as by a full disk, a quota or a limit on the size of files"
    return rank, reason


def _first(known: tuple[int, str] | None) -> tuple[int, str]:
    """The first rank on which something failed, in its own words if it has any. All ranks are here."""
    found = [known] * torch.distributed.get_world_size()
    torch.distributed.all_gather_object(found, known)
    told = [each for each in found if each is not None]
    own = [each for rank, each in enumerate(found) if each is not None and each[0] == rank]
    return (own or told or [(torch.distributed.get_rank(), "the log says why")])[0]


def _describe(folder: str, rank: int, reason: str) -> str:
    try:
        free = f", {shutil.disk_usage(folder).free / 1e9:.3g} GB are free there"
    except OSError:
        free = ""
    last = last_complete(folder)
    kept = "there is no complete checkpoint yet"
    if last is not None:
        kept = f"--load goes on from {last if last == RELEASE else f'iteration {last}'}"
    what = f"rank {rank} could not write its part of a checkpoint ({reason}{free})"
    return f"--save {folder}: {what}; {kept}"
