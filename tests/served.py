"""Servers of ``scmoe serve`` in processes of their own, forked with Megatron loaded already."""

import os
import re
import signal
import tempfile
import time
from pathlib import Path

from megatron_scmoe.platform.launch import free_port
from tests import harness


class Server:
    """``scmoe serve`` with these words, on some ranks; a context manager that ends it."""

    def __init__(self, *words, ranks: int = 1):
        self._folder = tempfile.TemporaryDirectory()
        self._log = Path(self._folder.name, "log")
        port = free_port()
        self._processes = [
            harness._context.Process(
                target=_serve,
                args=(rank, ranks, port, ["serve", *map(str, words), "--port", "0"], self._log),
            )
            for rank in range(ranks)
        ]
        for process in self._processes:
            process.start()
        self.url = self._wait_until_it_serves()

    @property
    def output(self) -> str:
        """What it has printed."""
        return self._log.read_text()

    def signal(self) -> None:
        """Send SIGTERM to all ranks, as a launcher does."""
        for process in self._processes:
            os.kill(process.pid, signal.SIGTERM)

    def end(self) -> list[int | None]:
        """Wait for the ranks' end; their exit statuses, None of one that stays."""
        for process in self._processes:
            process.join(harness.PATIENCE_S)
        return [process.exitcode for process in self._processes]

    def __enter__(self) -> "Server":
        return self

    def __exit__(self, *_) -> None:
        for process in self._processes:
            process.kill()
            process.join()
        self._folder.cleanup()

    def _wait_until_it_serves(self) -> str:
        deadline = time.monotonic() + harness.TIMEOUT_S
        while time.monotonic() < deadline:
            if self._log.exists() and (found := re.search(r" at (http://\S+):", self.output)):
                return found[1]
            if not all(process.is_alive() for process in self._processes):
                break
            time.sleep(0.02)
        output = self.output if self._log.exists() else ""
        self.__exit__()
        raise AssertionError(f"the server has not started\n{output}")


def _serve(rank: int, ranks: int, port: int, words: list[str], log: Path) -> None:
    """Be a rank; a launcher starts several, and nobody a single one."""
    import torch

    from megatron_scmoe.cli import program

    with harness._output_to(str(log)):
        torch.set_num_threads(1)
        if ranks > 1:
            harness._set_rank(rank, ranks)
            os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(port)}
        program.main(words)
