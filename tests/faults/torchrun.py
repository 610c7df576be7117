"""The real torchrun, and ranks, in processes that are forked with everything imported.

Importing PyTorch and Megatron takes longer than a job of these tests. Here torchrun runs in a process
of the tests' fork server, and where it would start a Python for a rank it forks itself. All else is
its own: rendezvous, watching, signals, error files, what it prints.
"""

import atexit
import gc
import os
import runpy
import signal
import subprocess
import sys
import time


def main(words: list[str], environment: dict[str, str], output: int | str) -> None:
    """Run torchrun with ``words`` in this process, which it ends.

    Args:
        output: a file to which everything is written.
    """
    os.setsid()
    stream = os.open(output, os.O_WRONLY | os.O_APPEND | os.O_CREAT)
    for number in (1, 2):
        os.dup2(stream, number)
    sys.stdout = os.fdopen(1, "w", buffering=1, closefd=False)
    sys.stderr = os.fdopen(2, "w", buffering=1, closefd=False)
    os.environ.update(environment)
    _run(lambda: _torchrun(words))


class Forked:
    """A rank: what torchrun asks of a ``subprocess.Popen``."""

    def __init__(self, args: tuple[str, ...], env: dict[str, str]):
        self.returncode: int | None = None
        sys.stdout.flush()
        sys.stderr.flush()
        self.pid = os.fork()
        if self.pid == 0:
            os.setsid()
            signal.signal(signal.SIGTERM, signal.SIG_DFL)  # torchrun has its own
            signal.signal(signal.SIGINT, signal.default_int_handler)
            os.environ.clear()
            os.environ.update(env)
            _run(lambda: _script(list(args)))

    def poll(self) -> int | None:
        if self.returncode is None:
            pid, status = os.waitpid(self.pid, os.WNOHANG)
            if pid:
                self.returncode = os.waitstatus_to_exitcode(status)
        return self.returncode

    def wait(self, timeout: float | None = None) -> int:
        end = time.monotonic() + (3600 if timeout is None else timeout)
        while self.poll() is None:
            if time.monotonic() > end:
                raise subprocess.TimeoutExpired("rank", timeout or 0)
            time.sleep(0.02)
        return self.returncode


def _torchrun(words: list[str]) -> None:
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing.subprocess_handler import subprocess_handler

    def popen(self, args, env):
        return Forked(args, env)

    subprocess_handler.SubprocessHandler._popen = popen
    run.main(words)


def _script(words: list[str]) -> None:
    """``python -u SCRIPT FLAGS``"""
    from multiprocessing import set_forkserver_preload, set_start_method

    script = words.index(next(word for word in words if word.endswith(".py")))
    sys.argv = words[script:]
    set_start_method("fork", force=True)  # what a rank started by a launcher has, and
    set_forkserver_preload(["__main__"])  # not what the tests' fork server imports
    runpy.run_path(sys.argv[0], run_name="__main__")


def _run(act) -> None:
    """Act as a Python of its own would, and end this process."""
    atexit._clear()
    gc.freeze()
    status = 1
    try:
        act()
        status = 0
    except SystemExit as stop:
        status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
    except BaseException:
        sys.excepthook(*sys.exc_info())
    finally:
        atexit._run_exitfuncs()
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(status)
