"""The study's child processes forked from tests/harness.py's server, which has Megatron loaded."""

import os
import runpy
import subprocess
import sys
import traceback
from multiprocessing import set_start_method
from pathlib import Path

import numpy as np
import torch

from tests import harness


class Popen:
    """Stands for ``subprocess.Popen`` of ``python -W ignore -m MODULE ...`` or ``... FILE ...``.

    Args:
        words: the command.
        stdout: an open file.
        cwd, env: of the process.
    """

    def __init__(self, words, stdout, cwd, env, stderr=None):
        task = (words[3:], stdout.name, str(cwd), env)
        self._process = harness._context.Process(target=_main, args=task)
        self._process.start()

    def poll(self) -> int | None:
        return self._process.exitcode

    def send_signal(self, number: int) -> None:
        os.kill(self._process.pid, number)

    def wait(self, timeout=None) -> int:
        self._process.join(timeout)
        return self._process.exitcode


def run(words, cwd, env, **_) -> subprocess.CompletedProcess:
    """Stands for ``subprocess.run`` of such a command, its output captured."""
    with open(Path(cwd) / "log", "w") as log:
        status = Popen(words, log, cwd, env).wait()
    return subprocess.CompletedProcess(words, status, (Path(cwd) / "log").read_text())


def write_tokens(folder: Path, vocabulary: int) -> None:
    """Random tokens, packed as data.py does: a text to train on, and one that is held out."""
    from megatron.core.datasets.indexed_dataset import IndexedDatasetBuilder

    draws = np.random.default_rng(1)
    folder.mkdir()
    for name, documents in (("train", 40), ("books", 3)):
        path = folder / f"{name}_text_document"
        builder = IndexedDatasetBuilder(f"{path}.bin", dtype=np.uint16)
        for _ in range(documents):
            tokens = draws.integers(1, vocabulary, 200) // draws.integers(1, 50, 200)
            builder.add_document(torch.tensor(tokens), [len(tokens)])
        builder.finalize(f"{path}.idx")


def _main(words: list[str], log: str, cwd: str, env: dict[str, str]) -> None:
    status = 0
    with harness._output_to(log):
        os.environ |= env
        os.chdir(cwd)
        torch.set_num_threads(1)
        set_start_method("fork", force=True)  # what a process of its own has: of the data's loader
        try:
            if words[0] == "-m":
                sys.argv = words[1:]
                runpy.run_module(words[1], run_name="__main__", alter_sys=True)
            else:
                sys.argv = words
                runpy.run_path(words[0], run_name="__main__")
        except SystemExit as stop:
            status = stop.code if isinstance(stop.code, int) else int(stop.code is not None)
        except BaseException:
            traceback.print_exc()
            status = 1
    os._exit(status)
