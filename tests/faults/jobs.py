"""Jobs of two ranks under the real torchrun, to which something happens."""

import contextlib
import os
import re
import signal
import tempfile
import threading
import time
from dataclasses import dataclass, field
from pathlib import Path

import psutil

from tests import small_run, tensorboard
from tests.faults import torchrun
from tests.harness import _context
from tests.tools import REPOSITORY

SCRIPT = "tests/faults/faulty_pretrain.py"
FLAGS = [
    *small_run.MODEL,
    *small_run.STEPS,
    *small_run.EP2,
    *("--global-batch-size", "8", "--lr", "1e-2", "--use-distributed-optimizer"),
    *("--scmoe-tune", "off"),
]
ITERATIONS, INTERVAL = 9, 3
TIMEOUT_S = 25
"""Of a collective, once the first iteration is done."""
END_S = 240
"""No job may take longer, whatever happens to it."""


@dataclass
class Screen:
    """What a job has printed, each line with the time at which it came (seconds)."""

    lines: list[tuple[float, str]] = field(default_factory=list)

    @property
    def text(self) -> str:
        return "\n".join(line for _, line in self.lines)

    @property
    def last_line(self) -> str:
        """The last one that says something: torchrun ends its report with a rule."""
        words = (line.strip() for _, line in reversed(self.lines))
        return next(line for line in words if line.strip("=- "))

    def time_of(self, pattern: str) -> float:
        return next(when for when, line in self.lines if re.search(pattern, line))


@dataclass
class Outcome:
    """A job that has ended."""

    status: int
    screen: Screen
    began: float
    ended: float

    @property
    def to_end_s(self) -> float:
        """From the fault to the end of the last process."""
        return self.ended - self.screen.time_of("^FAULT ")

    @property
    def to_be_back_s(self) -> float:
        """From the start to the first iteration."""
        return self.screen.time_of(r" iteration +\d+/") - self.began


class Job:
    """A training in a folder of its own, started as often as need be by one command.

    Args:
        data: prefix of a dataset.
        flags: go behind those of the model.
    """

    def __init__(self, folder: Path, data: Path, *flags: str):
        self.folder, self.checkpoints = folder, folder / "run"
        self.flags = [*FLAGS, "--train-data-path", str(data), *flags]
        self.flags += ["--save", str(self.checkpoints), "--load", str(self.checkpoints)]
        self.flags += ["--save-interval", str(INTERVAL), "--train-iters", str(ITERATIONS)]
        self.flags += ["--data-cache-path", str(folder / "cache")]
        self.flags += ["--tensorboard-dir", str(folder / "tensorboard")]
        self.flags += ["--distributed-timeout-seconds-after-init", str(TIMEOUT_S)]

    def run(self, fault: str = "none", *flags: str, during=None, **environment: str) -> Outcome:
        """Start it and wait for its end, which has to come within ``END_S``.

        Args:
            fault: a function of ``faulty_pretrain.py``.
            during: is called with the process and its screen, while the job runs.
        """
        words = ["--standalone", "--nproc-per-node=2", SCRIPT, *self.flags, *flags]
        return run(words, {"FAULT": fault} | environment, during)

    def saved(self) -> list[int]:
        """The iterations of which there is a folder."""
        return sorted(int(folder.name[5:]) for folder in self.checkpoints.glob("iter_*"))

    def tracker(self) -> str:
        return (self.checkpoints / "latest_checkpointed_iteration.txt").read_text()

    def shard(self, iteration: int) -> Path:
        return self.checkpoints / f"iter_{iteration:07d}" / "__1_0.distcp"

    def losses(self) -> dict[int, set[float]]:
        """By iteration; more than one where a start has repeated it with another loss."""
        return tensorboard.losses(self.folder / "tensorboard")


def run(
    words: list[str],
    environment: dict[str, str],
    during=None,
    space: str = "",
    is_lost: threading.Event | None = None,
) -> Outcome:
    """Run torchrun, and note the time of each line; all of its processes have to end.

    Args:
        space: the network namespace to run in; empty for this one.
        is_lost: when it is set, all processes are killed; the exit status is -9 then.
    """
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "output"
        output.touch()
        environment = {"OMP_NUM_THREADS": "1"} | environment
        began = time.monotonic()
        process = _context.Process(target=_torchrun, args=(words, environment, str(output), space))
        process.start()
        screen = Screen()
        done = threading.Event()
        reader = threading.Thread(target=_read, args=(output, screen, done))
        reader.start()
        try:
            if during is not None:
                during(process, screen)
            while process.exitcode is None and time.monotonic() < began + END_S:
                process.join(0.1)
                if is_lost is not None and is_lost.is_set():
                    for pid in _who_holds(output):
                        os.kill(pid, signal.SIGKILL)
            ended = time.monotonic()
            assert process.exitcode is not None, f"it goes on\n{screen.text[-3000:]}"
            left = _who_holds(output, 15)
            assert not left, f"{_described(left)} outlived the job\n{screen.text[-3000:]}"
        finally:
            done.set()
            reader.join()
            for pid in _who_holds(output):
                os.kill(pid, signal.SIGKILL)
        return Outcome(process.exitcode, screen, began, ended)


def _torchrun(words: list[str], environment: dict[str, str], output: str, space: str) -> None:
    os.chdir(REPOSITORY)
    if space:
        with open(f"/run/netns/{space}") as file:
            os.setns(file.fileno(), os.CLONE_NEWNET)
    torchrun.main(words, environment, output)


def _read(output: Path, screen: Screen, done: threading.Event) -> None:
    rest = ""
    with open(output, errors="replace") as stream:
        while True:
            is_last = done.is_set()
            *lines, rest = (rest + stream.read()).split("\n")
            screen.lines += [(time.monotonic(), line) for line in lines]
            if is_last:
                return
            time.sleep(0.01)


def _described(pids: list[int]) -> list[str]:
    found = []
    for pid in pids:
        with contextlib.suppress(psutil.Error):
            process = psutil.Process(pid)
            found.append(f"{pid} of {process.ppid()} ({process.status()}): {process.cmdline()}")
    return found


def _who_holds(output: Path, seconds: float = 0) -> list[int]:
    """Processes of a job that write to its output still, after so many seconds."""
    end = time.monotonic() + seconds
    while True:
        left = []
        for process in psutil.pids():
            with contextlib.suppress(OSError):
                if os.readlink(f"/proc/{process}/fd/1") == str(output):
                    left.append(process)
        if not left or time.monotonic() > end:
            return left
        time.sleep(0.2)
