"""Start a whole run on all ranks, each in a process of its own, and gather what the ranks found.

The processes of train_run.py stand beside the ranks and agree through PyTorch's store: on the port of
each run, on which run failed, on what every rank found.
"""

import contextlib
import json
import os
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from datetime import timedelta
from pathlib import Path

from train_result import error_line, parse_log

from megatron_scmoe.errors import ScMoEError
from megatron_scmoe.platform import launch

SCRIPT = Path(__file__).with_name("train_rank.py")

PATIENCE_S = 15
"""How long the other ranks may go on once one has failed: they wait in a collective."""

POLL_S = 0.5


class Ranks:
    """This process's place among those of all ranks."""

    def __init__(self, store, rank: int, world_size: int, ahead: bool = False):
        """``ahead``: start the process of the next run during a run, where cores are to spare."""
        self._store, self.rank, self.world_size = store, rank, world_size
        self._ahead = ahead
        self._next: subprocess.Popen | None = None
        self._runs = 0

    @classmethod
    def of_launcher(cls, ahead: bool) -> "Ranks":
        """As the environment says, which torchrun or two_hosts.sh has set."""
        from torch.distributed import rendezvous

        return cls(*next(iter(rendezvous("env://", timeout=timedelta(minutes=10)))), ahead)

    def run(self, is_stock: bool, flags: list[str], limit_s: float, log: Path | None) -> list[dict]:
        """Train once, and wait for the end.

        Args:
            flags: of the pretraining script.
            limit_s: after which the run is ended, and has failed.
            log: where this rank's output is kept; None to keep it nowhere.

        Returns:
            What each rank found, by rank: ``iterations``, ``losses``, ``peak_memory_mb``, ``machine``;
            of ranks that failed ``error``, one line.
        """
        self._runs += 1
        with tempfile.TemporaryDirectory() as folder:
            facts, output = Path(folder) / "facts.json", log or Path(folder) / "log"
            output.touch()
            task = {"facts": str(facts), "log": str(output), "flags": flags}
            task |= {"kind": "stock" if is_stock else "scmoe"}
            flaw = self._train(task, limit_s)
            text = output.read_text(errors="replace")
            if flaw is None:
                found = json.loads(facts.read_text()) | {"iterations": parse_log(text)}
            else:
                found = {"error": error_line(text) or flaw}
        self._say(f"found/{self.rank}", json.dumps(found))
        return [json.loads(self._hear(f"found/{rank}")) for rank in range(self.world_size)]

    def _train(self, task: dict, limit_s: float) -> str | None:
        """What went wrong; None if nothing."""
        if self.rank == 0:
            self._say("port", str(launch.free_port()))
        task["environment"] = {"MASTER_PORT": self._hear("port")}
        process, self._next = self._next or _start(), None
        try:
            with contextlib.suppress(BrokenPipeError):  # it has ended; its status says how
                assert process.stdin is not None
                process.stdin.write(json.dumps(task).encode() + b"\n")
                process.stdin.close()
            if self._ahead:
                self._next = _start()
            flaw = self._wait(process, limit_s)
        finally:
            _end(process)
        if flaw:
            self._say("failed", flaw)
        return flaw

    def _wait(self, process: subprocess.Popen, limit_s: float) -> str | None:
        begin, failed = time.monotonic(), None
        while process.poll() is None:
            time.sleep(POLL_S)
            now = time.monotonic()
            if now - begin > limit_s:
                return f"not done after {limit_s:.0f} s"
            if failed is None and self._has_failed():
                failed = now
            if failed is not None and now - failed > PATIENCE_S:
                return "another rank failed"
        status = process.returncode
        if not status:
            return None
        return f"exit status {status}" if status > 0 else f"ended by signal {-status}"

    def _key(self, name: str) -> str:
        return f"scmoe-train-run/{self._runs}/{name}"

    def _say(self, name: str, value: str) -> None:
        with _one_line_if_left():
            self._store.set(self._key(name), value)

    def _hear(self, name: str) -> str:
        with _one_line_if_left():
            return self._store.get(self._key(name)).decode()

    def _has_failed(self) -> bool:
        with _one_line_if_left():
            return self._store.check([self._key("failed")])

    def close(self) -> None:
        """Leave together: the first rank may hold the store."""
        if self._next is not None:
            _end(self._next)
        self._runs += 1
        self._say(f"done/{self.rank}", "")
        if self.rank == 0:
            for rank in range(self.world_size):
                self._hear(f"done/{rank}")


class RankLeftError(ScMoEError):
    """Another rank's process is gone, and with it the store or what it was to say."""

    status = 1


@contextlib.contextmanager
def _one_line_if_left() -> Iterator[None]:
    from torch.distributed import DistError

    try:
        yield
    except DistError as error:
        raise RankLeftError("the process of another rank has ended; what it says is why") from error


def _start() -> subprocess.Popen:
    """A process that waits for its task, with the launcher's environment but torchrun's own affairs.

    What it says before it has a log of its own is shown: it should be nothing.
    """
    path = os.pathsep.join([str(SCRIPT.parents[1]), os.environ.get("PYTHONPATH", "")])
    kept = {k: v for k, v in os.environ.items() if not k.startswith("TORCHELASTIC_")}
    own = {"OMP_NUM_THREADS": "1", "PYTHONPATH": path.rstrip(os.pathsep)}
    words = [sys.executable, "-W", "ignore", str(SCRIPT)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, env=kept | own)


def _end(process: subprocess.Popen) -> None:
    """Politely, then not."""
    for number in (signal.SIGTERM, signal.SIGKILL):
        if process.poll() is None:
            process.send_signal(number)
            with contextlib.suppress(subprocess.TimeoutExpired):
                process.wait(5)
