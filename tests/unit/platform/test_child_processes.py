"""A helper does not outlive the process that started it."""

import os
import signal
import subprocess
import sys
import time

import psutil
import pytest

RANK = """
import multiprocessing, os, sys, time
from megatron_scmoe.platform.child_processes import end_with_parent

def help():
    end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(60)

if __name__ == "__main__":
    multiprocessing.get_context(sys.argv[1]).Process(target=help).start()
    time.sleep(60)
"""


@pytest.mark.parametrize("method", ["fork", "forkserver"])
def test_a_helper_of_a_killed_process_ends(method, tmp_path):
    """A fork server stands between them, and would live as long as the helper does."""
    script = tmp_path / "rank.py"
    script.write_text(RANK)
    rank = subprocess.Popen([sys.executable, script, method], stdout=subprocess.PIPE, text=True)
    helper = psutil.Process(int(rank.stdout.readline()))
    os.kill(rank.pid, signal.SIGKILL)
    rank.wait()
    end = time.monotonic() + 10
    while helper.is_running() and helper.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.01)


DEAF = """
import multiprocessing, os, signal, sys
from multiprocessing import forkserver, resource_tracker
from megatron_scmoe.platform.child_processes import started_deaf_to

got = []
for name in ("SIGUSR1", "SIGTERM"):
    signal.signal(signal.Signals[name], lambda number, frame: got.append(number))
number = signal.Signals[sys.argv[1]]
with started_deaf_to(number):
    os.kill(os.getpid(), number)
    assert got == []  # it waits
assert got == [number]
queue = multiprocessing.get_context("forkserver").Queue()
child = multiprocessing.get_context("forkserver").Process(target=queue.get)
child.start()
for pid in (child.pid, forkserver._forkserver._forkserver_pid, resource_tracker._resource_tracker._pid):
    os.kill(pid, number)
queue.put("go on")
child.join(20)
assert child.exitcode == 0, child.exitcode
assert got == [number]
"""


@pytest.mark.parametrize("name", ["SIGUSR1", "SIGTERM"])
def test_helpers_do_not_hear_the_signal_at_which_a_rank_saves(name):
    ended = subprocess.run(
        [sys.executable, "-c", DEAF, name], capture_output=True, text=True, timeout=60
    )
    assert ended.returncode == 0, ended.stderr
    assert "resource_tracker" not in ended.stderr
