"""What command lines of tools and benchmarks share: errors of one line, outputs written whole."""

import argparse
import os
import shutil
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import NoReturn

from megatron_scmoe.errors import ScMoEError

LAST_WORD_S = 10  # how long other ranks wait for the first to say what is wrong


class UsageError(ScMoEError):
    """A wrong request: the message is one line that names the flag and what is accepted."""


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors take one line, defaults shown in `--help`."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_HelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        end(f"{self.prog}: error: {message} (see {self.prog} --help)", status=2)


def positive(text: str) -> int:
    """The ``type`` of flags that count something."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def run_tool(main: Callable[[], None]) -> NoReturn:
    """Run a command line and end the process: 0 done, 1 failed, 2 wrong request, 130 Ctrl-C."""
    prog = Path(sys.argv[0]).name
    try:
        main()
    except ScMoEError as error:
        end(f"{prog}: error: {error}", status=error.status)
    except OSError as error:
        end(f"{prog}: error: {error.filename or ''} {error.strerror or error}", status=1)
    except KeyboardInterrupt:
        print(f"{prog}: interrupted", file=sys.stderr)
        sys.exit(130)
    sys.exit(0)


def is_first_rank() -> bool:
    """By the launcher's environment, before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def end(message: str, status: int) -> NoReturn:
    """Say it on the first rank and exit; the launcher ends all ranks with the first that exits."""
    if is_first_rank():
        print(message, file=sys.stderr, flush=True)
    else:
        time.sleep(LAST_WORD_S)
    sys.exit(status)


def check_output(flag: str, path: Path, suffixes: Sequence[str]) -> None:
    """Refuse, before any work, an output that could not be written at its end.

    Raises UsageError.
    """
    if path.suffix not in suffixes:
        raise UsageError(f"{flag} {path}: accepted are names that end in {' or '.join(suffixes)}")
    if path.is_dir():
        raise UsageError(f"{flag} {path}: this is a folder; accepted is a file's name")
    if not path.parent.is_dir() or not os.access(path.parent, os.W_OK):
        raise UsageError(
            f"{flag} {path}: cannot write in {path.parent}; accepted is a folder that exists"
        )


def refuse_overwrite(flag: str, outputs: Sequence[Path], force: bool) -> None:
    """Raise UsageError if an output exists and `--force` was not given."""
    existing = [path for path in outputs if path.exists()]
    if existing and not force:
        raise UsageError(f"{flag}: {existing[0]} exists; give another {flag} or --force")


@contextmanager
def staged_outputs(flag: str, outputs: Sequence[Path]) -> Iterator[list[Path]]:
    """Paths to write to, moved to `outputs` when the block ends well, removed when it does not.

    The staging folder lies beside the outputs, so that moving is a rename. Old outputs go first:
    an interruption can leave some missing, never a mixture of old and new.
    """
    folder = outputs[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder))
    except OSError as error:
        raise UsageError(f"{flag}: cannot write in {folder} ({error.strerror})") from error
    try:
        staged = [staging / path.name for path in outputs]
        yield staged
        for path in outputs:
            path.unlink(missing_ok=True)
        for source, target in zip(staged, outputs, strict=True):
            os.replace(source, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for flags that have none to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, False)
        return super()._get_help_string(action) if has_default else action.help
