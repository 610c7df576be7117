"""Two hosts and a switch on one machine: network namespaces, and a bridge whose ports are pulled."""

import contextlib
import os
import shutil
import subprocess
import threading
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor

from tests.faults.jobs import SCRIPT, Job, Outcome, run

KILL_WAIT_S = 30

MISSING = [tool for tool in ("ip", "tc") if shutil.which(tool) is None]
WHY_NOT = (
    "network namespaces take root"
    if os.geteuid() != 0
    else f"{' and '.join(MISSING)} missing (Debian: iproute2)" if MISSING else ""
)  # fmt: skip
"""Why there can be no two hosts here; empty if there can."""


class Switch:
    """What joins the hosts."""

    def __init__(self) -> None:
        tag = f"fault{os.getpid()}"
        self.hosts = [f"{tag}a", f"{tag}b"]
        self._space = f"{tag}s"

    def build(self) -> None:
        for space in (self._space, *self.hosts):
            _ip("netns", "add", space)
            _ip("-n", space, "link", "set", "lo", "up")
        _ip("-n", self._space, "link", "add", "bridge", "type", "bridge")
        _ip("-n", self._space, "link", "set", "bridge", "up")
        for number, host in enumerate(self.hosts):
            _ip("link", "add", "eth0", "netns", host, "type", "veth",
                "peer", "name", f"port{number}", "netns", self._space)  # fmt: skip
            _ip("-n", host, "address", "add", f"10.88.0.{number + 1}/24", "dev", "eth0")
            _ip("-n", host, "link", "set", "eth0", "up")
            _ip("-n", self._space, "link", "set", f"port{number}", "up")
        self.join()

    def remove(self) -> None:
        for space in (*self.hosts, self._space):
            pids = subprocess.run(["ip", "netns", "pids", space], capture_output=True, text=True)
            for pid in pids.stdout.split():
                with contextlib.suppress(ProcessLookupError):
                    os.kill(int(pid), 9)
            subprocess.run(["ip", "netns", "delete", space], capture_output=True)

    def join(self) -> None:
        """Let both ports be on the bridge."""
        for number in range(2):
            _ip("-n", self._space, "link", "set", f"port{number}", "master", "bridge")

    def cut(self) -> None:
        """Pull one port: packets vanish, and no host sees that its link is down."""
        _ip("-n", self._space, "link", "set", "port1", "nomaster")

    def slow(self, rate: str) -> None:
        """Let a port pass no more than ``rate`` (10mbit)."""
        for number in range(2):
            subprocess.run(
                f"tc -n {self._space} qdisc replace dev port{number} root"
                f" tbf rate {rate} burst 16kb latency 400ms".split(),
                check=True,
            )


@contextlib.contextmanager
def switch() -> Iterator[Switch]:
    joined = Switch()
    try:
        joined.build()
        yield joined
    finally:
        joined.remove()


def run_on_two_hosts(job: Job, joined: Switch, during=None, *flags: str) -> list[Outcome]:
    """Start a torchrun on each host, and wait for the end of both.

    Where one fails, the other has half a minute and is killed: ``srun --kill-on-bad-exit``.

    Args:
        during: is called with the first host's screen, while the job runs.
    """

    is_over = threading.Event()

    def host(number: int) -> Outcome:
        words = ["--nnodes=2", "--nproc-per-node=1", "--rdzv-backend=c10d", "--rdzv-id=fault"]
        words += ["--rdzv-endpoint=10.88.0.1:29400", f"--local-addr=10.88.0.{number + 1}"]
        words += [f"--rdzv-conf=is_host={int(number == 0)}"]  # their names are the same
        environment = {"GLOO_SOCKET_IFNAME": "eth0", "FAULT": "none"}
        words += [SCRIPT, *job.flags, *flags]
        act = during if number == 0 else None
        try:
            ended = run(words, environment, act, joined.hosts[number], is_over)
        except BaseException:
            is_over.set()
            raise
        if ended.status and not is_over.is_set():
            threading.Timer(KILL_WAIT_S, is_over.set).start()
        return ended

    with ThreadPoolExecutor(2) as pool:
        return list(pool.map(host, range(2)))


def wait_until(condition, seconds: float = 90) -> None:
    """Until it holds, or so long; a job that failed never fulfils it."""
    end = time.monotonic() + seconds
    while not condition() and time.monotonic() < end:
        time.sleep(0.02)


def _ip(*words: str) -> None:
    subprocess.run(["ip", *words], check=True)
