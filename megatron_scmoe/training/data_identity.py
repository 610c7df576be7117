"""Whether a run that goes on reads the data that its checkpoint was trained on.

The order of the samples follows from seed and sizes. Where a dataset was made anew under its old name,
a resumed run would read other tokens without a word, by an index of the old ones.
"""

import argparse
import os
import zlib
from collections.abc import Iterable

from megatron.core.datasets.indexed_dataset import get_bin_path, get_idx_path

from megatron_scmoe.errors import InputError
from megatron_scmoe.platform.first_rank import ask_first_rank
from megatron_scmoe.training.resuming import changed
from megatron_scmoe.training.saved_run import SavedRun

ARGUMENT = "scmoe_data_identity"
"""The argument in which a checkpoint keeps it: a word for each dataset, by its absolute prefix."""

SAMPLE = 1 << 16
"""Bytes that are read at each of three places of a file."""


def keep(args: argparse.Namespace, prefixes: Iterable[str]) -> None:
    """Put the identity into ``args``, which are saved; the first rank reads it, for all."""
    setattr(args, ARGUMENT, ask_first_rank(lambda: identity(prefixes)))


def check(args: argparse.Namespace, saved: SavedRun, prefixes: Iterable[str]) -> None:
    """Compare it with the one that the checkpoint keeps.

    Raises:
        InputError: if a dataset has the name of one of then, and other contents.
    """
    before = getattr(saved.args, ARGUMENT, None) or {}
    if saved.begins_anew(args) or "data_path" in changed(args):
        return
    for prefix, word in identity(prefixes).items():
        if before.get(prefix, word) != word:
            raise InputError(
                f"the data {prefix}",
                f"its files are not those that {saved.path} was trained on",
                "these; or, for other data on purpose, --scmoe-changed data-path with another or an "
                "empty --data-cache-path",
            )


def identity(prefixes: Iterable[str]) -> dict[str, str]:
    """A word for the contents of each dataset: sizes, and checksums of samples."""
    return {
        os.path.abspath(prefix): " ".join(
            _word(path) for path in (get_idx_path(prefix), get_bin_path(prefix))
        )
        for prefix in prefixes
    }


def _word(path: str) -> str:
    size, checksum = os.path.getsize(path), 0
    with open(path, "rb") as stream:
        for start in (0, (size - SAMPLE) // 2, size - SAMPLE):
            stream.seek(max(0, start))
            checksum = zlib.crc32(stream.read(SAMPLE), checksum)
    return f"{size}:{checksum:08x}"
