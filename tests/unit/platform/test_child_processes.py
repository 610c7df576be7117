"""A helper does not outlive the process that started it."""

import os
import signal
import subprocess
import sys
import time

import psutil

RANK = """
import multiprocessing, os, time
from megatron_scmoe.platform.child_processes import end_with_parent

def help():
    end_with_parent()
    print(os.getpid(), flush=True)
    time.sleep(60)

multiprocessing.get_context("fork").Process(target=help).start()
time.sleep(60)
"""


def test_a_helper_of_a_killed_process_ends():
    rank = subprocess.Popen([sys.executable, "-c", RANK], stdout=subprocess.PIPE, text=True)
    helper = psutil.Process(int(rank.stdout.readline()))
    os.kill(rank.pid, signal.SIGKILL)
    rank.wait()
    end = time.monotonic() + 10
    while helper.is_running() and helper.status() != psutil.STATUS_ZOMBIE:
        assert time.monotonic() < end
        time.sleep(0.01)
