"""A command line for torchrun whose ranks fail in a given way: `ranks.py HOW`."""

import os
import signal
import sys
import time

from megatron_scmoe.platform.command_line import UsageError, run_command


class Lost(RuntimeError):
    """As a rank's collective fails when another rank is gone."""


def main() -> None:
    how, rank = sys.argv[1], int(os.environ["RANK"])
    print(f"rank {rank} has begun\n", end="", flush=True)  # in one piece beside the other rank's
    if how == "all refuse":
        raise UsageError("--flag 1: it is odd; accepted: 2")
    if how == "one refuses" and rank == 1:
        raise UsageError("--flag 1: it is odd; accepted: 2")
    if how == "all crash" or (how == "one crashes" and rank == 1):
        raise ValueError("a bug")
    if how == "one crashes, one is lost":
        if rank == 1:
            time.sleep(0.5)
            raise ValueError("a bug")
        raise Lost("[gloo/transport/tcp/pair.cc:547] Connection closed by peer")
    if how == "one is killed" and rank == 1:
        os.kill(os.getpid(), signal.SIGKILL)
    if how == "one ends itself" and rank == 1:
        sys.exit(3)
    if how != "none":
        time.sleep(60)


if __name__ == "__main__":
    run_command(main)
