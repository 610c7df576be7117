"""What command lines share: errors of one line, bugs with their traceback, outputs written whole.

Under torchrun the last thing on the screen is what torchrun itself prints of the first rank that
failed: what stands in that rank's error file. So reasons and tracebacks are put there, and printed
only where nobody would read the file.
"""

import argparse
import atexit
import contextlib
import errno
import io
import json
import os
import signal
import socket
import sys
import time
import traceback
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import NoReturn

from megatron_scmoe.errors import ScMoEError, with_nearest_flags
from megatron_scmoe.platform.atomic_write import atomic_write

LAST_WORD_S = 10
"""How long other ranks wait for the first to say what is wrong; the launcher then ends them."""


class UsageError(ScMoEError):
    """A wrong request: the message is one line that names the flag and what is accepted."""


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors take one line, defaults shown in `--help`."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=HelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        words = with_nearest_flags(self, message)
        end(f"{self.prog}: error: {words} (see {self.prog} --help)", status=2)


class HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for flags that have none to speak of or whose help names it."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        text = action.help or ""
        if action.default in (None, False) or "default" in text.lower():
            return text
        return super()._get_help_string(action)


def positive(text: str) -> int:
    """The ``type`` of flags that count something."""
    if not text.isdigit() or int(text) == 0:
        raise argparse.ArgumentTypeError(f"{text} is not a whole number above 0")
    return int(text)


def run_tool(main: Callable[[], None]) -> NoReturn:
    """As :func:`run_command`; files that cannot be read or written are one line too (status 1)."""

    def with_files():
        try:
            main()
            sys.stdout.flush()
        except BrokenPipeError:  # whoever read the output has seen enough
            os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
            sys.exit(1)
        except OSError as error:
            raise _Failed(f"{error.filename or ''} {error.strerror or error}".strip()) from error

    run_command(with_files)


def run_command(main: Callable[[], None]) -> NoReturn:
    """Run a command line and end the process: 0 done, 1 failed, 2 wrong request, 130 Ctrl-C.

    Errors of this package are one line. Everything else is a bug, and keeps its traceback.
    """
    _open_closed_streams()
    _leave_a_word_for_a_violent_end()
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):  # a terminal may know fewer characters than a text
            stream.reconfigure(errors="backslashreplace")
    try:
        main()
    except ScMoEError as error:
        end(f"{_prog()}: error: {error}", status=error.status)
    except KeyboardInterrupt:
        print(f"{_prog()}: interrupted", file=sys.stderr)
        sys.exit(130)
    except Exception as error:
        if not _launcher_will_say():
            raise
        if was_left_by_another_rank(error):
            _wait_for_the_end(LAST_WORD_S)
        elif not is_first_rank():
            _wait_for_the_end(LAST_WORD_S / 5)  # all may fail alike
        _write_error_file(_with_rank(error))
        sys.exit(1)
    sys.exit(0)


def _open_closed_streams() -> None:
    """Let a stream that the shell closed (`>&-`) lead nowhere: Python has None for it.

    A file that is opened later would get its number, and with it what libraries print.
    """
    for name, mode in (("stdin", "r"), ("stdout", "w"), ("stderr", "w")):
        if getattr(sys, name) is None:
            setattr(sys, name, open(os.devnull, mode))  # noqa: SIM115  # as long as the process


def asks_for_help() -> bool:
    """Whether the command line asks for help, before there is a parser."""
    return not {"-h", "--help"}.isdisjoint(sys.argv[1:])


def is_first_rank() -> bool:
    """By the launcher's environment, before there is a process group."""
    return os.environ.get("RANK", "0") == "0"


def was_left_by_another_rank(error: BaseException) -> bool:
    """Whether the error may be no more than the end of a rank that it was connected to."""
    kinds = {kind.__name__ for kind in type(error).__mro__}
    return "DistError" in kinds or "gloo" in str(error) or "Connection" in str(error)


def end(message: str, status: int) -> NoReturn:
    """Say it and exit; the launcher ends all ranks with the first that exits, which is the first.

    The other ranks wait for it. They have their say only where it does not come: if it has not found
    what they found, or is on another host.
    """
    if not is_first_rank():
        first_here = os.environ.get("LOCAL_RANK") == "0"
        _wait_for_the_end(LAST_WORD_S / 2 if first_here else LAST_WORD_S)
    if _launcher_will_say():
        _write_error_file(message)
    else:
        print(message, file=sys.stderr, flush=True)
    sys.exit(status)


def check_input(flag: str, path: Path) -> None:
    """Refuse, before any work, a file that could not be read, once by each rank.

    Raises UsageError.
    """
    if path.is_file():
        return
    if path.is_dir():
        raise UsageError(f"{flag} {path}: this is a folder; accepted is a file")
    if not path.exists():
        raise UsageError(f"{flag} {path}: there is no such file")
    if not path.is_fifo():
        raise UsageError(f"{flag} {path}: a device, no file; accepted is a file or a pipe")
    ranks = int(os.environ.get("WORLD_SIZE", "1"))
    if ranks > 1:
        raise UsageError(
            f"{flag} {path}: a pipe, which one process can read, and here are {ranks} ranks; accepted "
            "is a file"
        )


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
            f"{flag} {path}: cannot write in {path.parent}; accepted is a folder that can be written to"
        )


def refuse_overwrite(flag: str, outputs: Sequence[Path], force: bool) -> None:
    """Raise UsageError if an output exists and `--force` was not given."""
    existing = [path for path in outputs if path.exists()]
    if existing and not force:
        raise UsageError(f"{flag}: {existing[0]} exists; give another {flag} or --force")


def refuse_same(flag: str, output: Path, source: Path | None) -> None:
    """Raise UsageError if a file is to be written over what is read, even with `--force`."""
    if source is not None and output.exists() and output.samefile(source):
        raise UsageError(f"{flag} {output}: it is what is read; accepted is another file")


def file_prefix(text: str) -> Path:
    """The ``type`` of flags that name how files begin."""
    if text.endswith(os.sep):
        raise argparse.ArgumentTypeError(
            f"{text}: a folder; accepted is how the files in it begin: {text}NAME"
        )
    return Path(text)


@contextmanager
def staged_outputs(flag: str, outputs: Sequence[Path]) -> Iterator[list[Path]]:
    """Paths to write to, see :func:`atomic_write`; the folder of the outputs is made if need be.

    Raises UsageError if nothing can be written there.
    """
    folder = outputs[0].parent
    with ExitStack() as stack:
        try:
            folder.mkdir(parents=True, exist_ok=True)
            staged = stack.enter_context(atomic_write(*outputs))
        except OSError as error:
            raise UsageError(f"{flag}: cannot write in {folder} ({error.strerror})") from error
        try:
            yield staged
        except OSError as error:
            if error.errno != errno.ENOSPC:
                raise
            raise DiskFullError(
                f"{flag} {outputs[0]}: the disk is full; accepted: a folder on another disk"
            ) from error


def _prog() -> str:
    return Path(sys.argv[0]).name


class _Failed(ScMoEError):
    """A file or a disk failed; the request was right."""

    status = 1


class DiskFullError(_Failed):
    """An output does not fit; nothing of it is left."""


_ERROR_FILE = "TORCHELASTIC_ERROR_FILE"


def _launcher_will_say() -> bool:
    """Whether torchrun prints what stands in the error file: if it does not start the ranks again."""
    restarts = (os.environ.get(f"TORCHELASTIC_{name}", "0") for name in _RESTARTS)
    return _ERROR_FILE in os.environ and len(set(restarts)) == 1


def _leave_a_word_for_a_violent_end() -> None:
    """Write the error file in advance: a rank that is killed cannot, and torchrun names no rank then.

    It goes when the process ends by itself, and gives way to what that has to say. torchrun shows the
    file with the earliest time, and of equal ones the first that it finds. So all of a host have the
    same time, that of the folder, and the rank that ended first is shown.
    """
    if not _launcher_will_say() or "RANK" not in os.environ:
        return
    file = Path(os.environ[_ERROR_FILE])
    with contextlib.suppress(OSError):
        if not all(map(_is_word_in_advance, _files_of_others(file))):
            return  # another rank of this host has failed before this one began
        when = int(file.parents[1].stat().st_ctime)
        _write(file, _VIOLENT_END.format(rank=os.environ["RANK"], host=socket.gethostname()), when)
        atexit.register(_forget_word, file, os.getpid())


_VIOLENT_END = (
    "rank {rank} on {host} was ended by a signal and said nothing; exitcode (above) -9: a kill, as "
    "by a kernel without memory; -15: the launcher, after another rank; -6, -11: a crash"
)
"""What torchrun shows of a rank that was killed."""


def _is_word_in_advance(file: Path) -> bool:
    return "was ended by a signal and said nothing" in file.read_text()


def _files_of_others(file: Path) -> list[Path]:
    """Error files of other ranks of this host."""
    return [other for other in file.parents[1].glob(f"*/{file.name}") if other != file]


def _forget_word(file: Path, writer: int) -> None:
    if os.getpid() != writer:  # a child that was forked
        return
    with contextlib.suppress(OSError):
        if _is_word_in_advance(file):
            file.unlink()


def _write(file: Path, message: str, when: int) -> None:
    content = {"py_callstack": f"\n{message}", "timestamp": str(when)}
    data = {"message": {"message": message, "extraInfo": content}}
    unfinished = file.with_suffix(".unfinished")  # the others of this host look into it
    unfinished.write_text(json.dumps(data))
    unfinished.replace(file)


_END_COMES_S = 60
"""How long the launcher may take to end a rank, once another has said what is wrong and exits."""

_RESTARTS = ("RESTART_COUNT", "MAX_RESTARTS")


def _write_error_file(message: str) -> None:
    """In the form of ``torch.distributed.elastic.multiprocessing.errors.ErrorHandler``.

    That one writes a traceback of every exception; a refusal has none.
    """
    sys.stdout.flush()
    file = Path(os.environ[_ERROR_FILE])
    others = _files_of_others(file)
    if not all(map(_is_word_in_advance, others)):
        _wait_for_the_end(_END_COMES_S)  # another rank of this host has said what is wrong
        return
    _write(file, message, int(time.time()))
    for other in others:  # theirs are earlier, and the launcher is about to end them
        other.unlink(missing_ok=True)


def _with_rank(error: BaseException) -> str:
    """The traceback; its last part, which is the last on the screen, names the rank."""
    *trace, last = traceback.format_exception(error)
    return "".join([*trace, f"rank {os.environ.get('RANK')}: {last}"]).rstrip()


def _wait_for_the_end(seconds: float) -> None:
    """Wait, so that the rank that knows the reason gives it; the launcher's signal ends the wait."""
    signal.signal(signal.SIGTERM, signal.SIG_DFL)  # Megatron may have set a handler of its own
    time.sleep(seconds)
