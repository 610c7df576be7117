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
