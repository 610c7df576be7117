"""What is evaluated and what comes out: sequences of tokens, a report, a file of logits."""

import math
import os
from contextlib import contextmanager
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from megatron_scmoe.errors import InputError
from megatron_scmoe.platform.atomic_write import atomic_write, lack_of_space

NO_LABEL = -1
"""In labels: this position predicts nothing."""


@dataclass(frozen=True)
class Sequences:
    """What is evaluated: tokens and the label of each, int64 [n, s]; NO_LABEL where there is none."""

    tokens: np.ndarray
    labels: np.ndarray

    @staticmethod
    def from_stream(ids: np.ndarray, length: int) -> "Sequences":
        """Cut one stream of ids into rows of ``length``; the label of a token is the one after it.

        The last row is filled up with id 0, behind all that counts.
        """
        rows = max(1, math.ceil((len(ids) - 1) / length))
        tokens = np.zeros(rows * length, dtype=np.int64)
        labels = np.full(rows * length, NO_LABEL, dtype=np.int64)
        tokens[: len(ids)] = ids[: rows * length]
        labels[: len(ids) - 1] = ids[1 : rows * length + 1]
        return Sequences(tokens.reshape(rows, length), labels.reshape(rows, length))

    @staticmethod
    def from_rows(rows: np.ndarray) -> "Sequences":
        """Rows that stand for themselves, [n, s]: the last token of each has no label."""
        labels = np.full(rows.shape, NO_LABEL, dtype=np.int64)
        labels[:, :-1] = rows[:, 1:]
        return Sequences(rows.astype(np.int64), labels)

    def first(self, count: int) -> "Sequences":
        """The first ``count`` rows."""
        return Sequences(self.tokens[:count], self.labels[:count])

    def check(self, given: str, vocab_size: int) -> None:
        """Refuse ids outside the vocabulary, with a :class:`InputError` that names ``given``."""
        low, high = int(self.tokens.min()), int(max(self.tokens.max(), self.labels.max()))
        if low < 0 or high >= vocab_size:
            raise InputError(
                given,
                f"it has the id {low if low < 0 else high}",
                f"ids from 0 to {vocab_size - 1}, the vocabulary of the model",
            )


@dataclass(frozen=True)
class Report:
    """The outcome.

    ``loss`` is the mean cross entropy in nats of ``tokens`` labels, over the tokens of the vocabulary.
    ``padded_loss`` has the rows that pad Megatron's vocabulary in the softmax as well, as the loss that
    training logs; None if there are none.
    """

    loss: float
    tokens: int
    sequences: int
    padded_loss: float | None = None

    @property
    def perplexity(self) -> float:
        """exp(loss); inf where no float can hold it."""
        try:
            return math.exp(self.loss)
        except OverflowError:
            return math.inf


@dataclass(frozen=True)
class Batch:
    """``count`` rows from row ``start`` on, filled up to the size of a micro-batch."""

    start: int
    count: int
    tokens: np.ndarray
    labels: np.ndarray


def batches(sequences: Sequences, size: int, ranks: int) -> list[Batch]:
    """Micro-batches of equal size, as many for each rank; those that only fill up count no row."""
    total = len(sequences.tokens)
    batches = []
    for start in range(0, total, size):
        rows = np.minimum(np.arange(start, start + size), total - 1)
        batches.append(
            Batch(start, min(size, total - start), sequences.tokens[rows], sequences.labels[rows])
        )
    while len(batches) % ranks:
        batches.append(replace(batches[-1], count=0))
    return batches


def check_space(path: Path, shape: tuple[int, int, int]) -> None:
    """Refuse a disk without space for float32 logits of this shape.

    Raises:
        InputError: it names ``--logits-out``.
    """
    lack = lack_of_space(path.absolute().parent, math.prod(shape) * 4)
    if lack:
        accepted = "a file on another disk, or fewer sequences (--limit)"
        raise InputError(f"--logits-out {path}", lack, accepted)


@contextmanager
def logits_file(path: Path, shape: tuple[int, int, int]):
    """A float32 .npy file to fill in place, at ``path`` when it is whole."""
    with atomic_write(path) as (part,):
        file = np.lib.format.open_memmap(part, mode="w+", dtype=np.float32, shape=shape)
        try:
            with open(part, "r+b") as stream:  # a mapping of a file with holes dies on a full disk
                os.posix_fallocate(stream.fileno(), 0, part.stat().st_size)
        except OSError as error:
            raise InputError(
                f"--logits-out {path}", error.strerror or str(error), "a file on another disk"
            ) from error
        yield file
        file.flush()
