"""What scmoe evaluate reads its text and ids from."""

import io
from argparse import Namespace

import numpy as np
import pytest

from megatron_scmoe.cli.evaluate import describe, main, read_sequences
from megatron_scmoe.evaluation.sequences import Report
from megatron_scmoe.platform.command_line import UsageError, check_input
from tests.tools import pipe

IDS = [5, 6, 7, 8]


def npy() -> bytes:
    stream = io.BytesIO()
    np.save(stream, np.array(IDS))
    return stream.getvalue()


def test_a_row_is_not_longer_than_the_text_and_a_byte_order_mark_is_no_text(tmp_path):
    file = tmp_path / "text.txt"
    file.write_bytes(b"\xef\xbb\xbf" + bytes(IDS))
    args = Namespace(text=file, tokens=None, sequence_length=None, limit=None)
    sequences = read_sequences(args, lambda text: np.frombuffer(text.encode(), np.uint8), 10**9)
    assert sequences.tokens.tolist() == [IDS]
    assert sequences.labels[0, :-1].tolist() == IDS[1:]


def test_what_is_read_is_not_written_over(tmp_path):
    ids = tmp_path / "ids.npy"
    ids.write_bytes(npy())
    flags = ["--hf", ".", "--tokens", str(ids), "--logits-out", str(ids), "--force"]
    with pytest.raises(UsageError, match=f"--logits-out {ids}: it is what is read; accepted is an"):
        main(flags)
    assert ids.read_bytes() == npy()


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


def test_a_loss_whose_exponential_no_float_holds_is_told():
    assert describe(Report(800.0, 2, 1)).startswith(
        "loss 800.000000 nats per token, perplexity inf ("
    )


@pytest.mark.parametrize("name", ["a.jsonl", "A.JSONL", "a.ndjson"])
def test_json_lines_are_no_text(name, tmp_path):
    file = tmp_path / name
    file.write_text('{"text": "a"}\n')
    with pytest.raises(
        UsageError, match=f"^--text {file}: JSON lines, whose braces and names would"
    ):
        main(["--load", str(tmp_path), "--text", str(file)])


@pytest.mark.parametrize("encoding", ["utf-16-le", "utf-16-be", "utf-32-le"])
def test_a_text_with_nul_is_refused(encoding, tmp_path):
    """ASCII in these encodings is valid UTF-8."""
    file = tmp_path / "text.txt"
    file.write_bytes("some text".encode(encoding))
    args = Namespace(text=file, tokens=None, sequence_length=None, limit=None)
    with pytest.raises(UsageError, match=rf"^--text {file}: byte \d is NUL, as in UTF-16 and in "):
        read_sequences(args, lambda text: np.frombuffer(text.encode(), np.uint8), 8)
