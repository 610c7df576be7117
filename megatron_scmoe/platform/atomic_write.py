"""Files and folders that appear whole or not at all."""

import errno
import os
import shutil
import stat
import tempfile
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path


@contextmanager
def atomic_write(*targets: Path) -> Iterator[list[Path]]:
    """Paths to write files or folders to, which take the targets' names when the block ends well.

    They have the targets' names in a hidden folder beside the first target. After any error, an
    interrupt included, nothing of them is left, and what the targets were before is there.

    A file takes the place of another at once. Of several targets, and of a folder, the old goes
    first: a process killed just then leaves some missing, never old ones beside new ones.

    Raises:
        OSError: before the block, if nothing can be written beside the first target; behind it, if
            a target was not written, or a file would replace a folder.
    """
    hidden = Path(tempfile.mkdtemp(prefix=".writing-", dir=targets[0].parent))
    try:
        new, old = hidden / "new", hidden / "old"
        new.mkdir()
        old.mkdir()
        written = [new / target.name for target in targets]
        yield written
        for source, target in zip(written, targets, strict=True):
            if not stat.S_ISDIR(source.stat().st_mode) and target.is_dir():
                raise IsADirectoryError(errno.EISDIR, os.strerror(errno.EISDIR), str(target))
        if len(targets) == 1 and not targets[0].is_dir():
            written[0].replace(targets[0])
        else:
            _exchange(written, targets, old)
    finally:
        shutil.rmtree(hidden, ignore_errors=True)


def lack_of_space(folder: Path, needed_bytes: int) -> str | None:
    """What to say if less is free where ``folder`` is; None if there is enough."""
    free = shutil.disk_usage(folder).free
    if free >= needed_bytes:
        return None
    return f"{_in_words(needed_bytes)} are needed, {_in_words(free)} are free"


def _in_words(nbytes: int) -> str:
    return f"{nbytes / 1e9:.2f} GB" if nbytes >= 1e9 else f"{nbytes / 1e6:.1f} MB"


def _exchange(written: Sequence[Path], targets: Sequence[Path], old: Path) -> None:
    """Move what there is into ``old``, and what was written to the targets; all or nothing."""
    try:
        for target in targets:
            if os.path.lexists(target):
                target.rename(old / target.name)
        for source, target in zip(written, targets, strict=True):
            source.rename(target)
    except BaseException:
        for source, target in zip(written, targets, strict=True):
            if os.path.lexists(target) and not source.exists():
                target.rename(source)
        for target in targets:
            if os.path.lexists(old / target.name):
                (old / target.name).rename(target)
        raise
