"""What scmoe evaluate reads its text and ids from."""

import io
from argparse import Namespace

import numpy as np
import pytest

from megatron_scmoe.cli.evaluate import read_sequences
from megatron_scmoe.platform.command_line import UsageError, check_input
from tests.tools import pipe

IDS = [5, 6, 7, 8]


def npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array(IDS))
    return stream.getvalue()


@pytest.mark.parametrize(("flag", "content"), [("text", bytes(IDS)), ("tokens", npy())])
def test_text_and_ids_may_come_from_a_pipe_to_one_process(flag, content, monkeypatch):
    with pipe(content) as file:
        monkeypatch.setenv("WORLD_SIZE", "2")
        with pytest.raises(UsageError, match="a pipe, which one process can read, and here are 2"):
            check_input(f"--{flag}", file)
        monkeypatch.delenv("WORLD_SIZE")
        check_input(f"--{flag}", file)
        args = Namespace(text=None, tokens=None, sequence_length=None, limit=None)
        setattr(args, flag, file)
        sequences = read_sequences(args, lambda text: np.frombuffer(text.encode(), np.uint8), 8)
    assert sequences.tokens[0, : len(IDS)].tolist() == IDS
