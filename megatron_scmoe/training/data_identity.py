"""Whether a run that goes on reads the data that its checkpoint was trained on.

The order of the samples follows from seed and sizes. Where a dataset was made anew under its old name,
a resumed run would read other tokens without a word, by an index of the old ones. Another seed, split
or dataset may be meant, and is said.
"""

import argparse
import os
import zlib
from collections.abc import Iterable, Mapping
from typing import Any

from megatron.core.datasets.indexed_dataset import get_bin_path, get_idx_path

from megatron_scmoe.arguments import in_flags
from megatron_scmoe.errors import InputError
from megatron_scmoe.platform.first_rank import ask_first_rank
from megatron_scmoe.training.indexed_dataset import parse_split
from megatron_scmoe.training.resuming import changed
from megatron_scmoe.training.run_checks import data_parallel_size
from megatron_scmoe.training.saved_run import SavedRun

ARGUMENT = "scmoe_data_identity"
"""The argument in which a checkpoint keeps it: a word for each dataset, by its absolute prefix."""

ORDERING = (
    "seed",
    "seq_length",
    "split",
    "mock_data",
    "data_path",
    "train_data_path",
    "data_args_path",
    "per_split_data_args_path",
    "dataloader_type",
)
"""Arguments from which the order of the training samples follows, beside their number."""

SAMPLE = 1 << 16
"""Bytes that are read at each of three places of a file."""


def keep(args: argparse.Namespace, prefixes: Iterable[str]) -> None:
    """Put the identity into ``args``, which are saved; the first rank reads it, for all."""
    setattr(args, ARGUMENT, ask_first_rank(lambda: identity(prefixes)))


def check(args: argparse.Namespace, saved: SavedRun, prefixes: Iterable[str]) -> None:
    """Compare it with the one that the checkpoint keeps; on the first rank.

    Raises:
        InputError: if a dataset has the name of one of then, and other contents.
    """
    before = getattr(saved.args, ARGUMENT, None) or {}
    if saved.begins_anew(args) or "data_path" in changed(args):
        return
    now = identity(prefixes)
    for prefix, word in now.items():
        if before.get(prefix, word) != word:
            raise InputError(
                f"the data {prefix}",
                f"its files are not those that {saved.path} was trained on",
                "these; or, for other data on purpose, --scmoe-changed data-path with another or an "
                "empty --data-cache-path",
            )
    if getattr(saved.args, "consumed_train_samples", 0) and not args.skip_train:
        _check_batches(args, saved)
        _say_what_orders_anew(args, now, saved, before)


def _check_batches(args: argparse.Namespace, saved: SavedRun) -> None:
    """Of ``--dataloader-type cyclic`` Megatron asserts that it goes on between two batches."""
    at_once = args.micro_batch_size * data_parallel_size(args)
    done = getattr(saved.args, "consumed_train_samples", 0)
    if args.dataloader_type == "cyclic" and done % at_once:
        raise InputError(
            f"--micro-batch-size {args.micro_batch_size} with --dataloader-type cyclic",
            f"{saved.path} has drawn {done} samples, and this run's replicas draw {at_once} at once",
            f"a size by which {done} can be divided",
        )


def _say_what_orders_anew(
    args: argparse.Namespace, now: Mapping[str, str], saved: SavedRun, before: Mapping[str, str]
) -> None:
    """Name what Megatron draws other samples by: it only counts how many were drawn."""
    theirs = saved.args or argparse.Namespace()
    now = now if before else {}  # older and converted checkpoints say names alone
    found = [
        name
        for name in ORDERING
        if hasattr(theirs, name) and _meaning(name, args, now) != _meaning(name, theirs, before)
    ]
    mine = [in_flags(name, getattr(args, name)) for name in found]
    was = [in_flags(name, getattr(theirs, name)) for name in found]
    if args.dataloader_type == "cyclic" and not found:
        _add_shares(args, theirs, mine, was)
    if mine:
        print(
            f"WARNING: {', '.join(mine)}: {saved.path} was trained with {', '.join(was)}; samples come "
            "in another order from here on, and some that were drawn may be drawn again, or serve "
            "validation",
            flush=True,
        )


def _add_shares(
    args: argparse.Namespace, theirs: argparse.Namespace, mine: list[str], was: list[str]
) -> None:
    """A cyclic loader shuffles the share of each replica, or all samples for all of them."""
    now = (args.data_sharding, data_parallel_size(args))
    before = (
        getattr(theirs, "data_sharding", now[0]),
        getattr(theirs, "data_parallel_size", now[1]),
    )
    if now != before:
        for told, (apart, replicas) in ((mine, now), (was, before)):
            told += [in_flags("data_sharding", apart), f"{replicas} data-parallel replicas"]


def _meaning(name: str, args: argparse.Namespace, words: Mapping[str, str]) -> Any:
    """An argument's value, with contents in place of the names of datasets."""
    value = getattr(args, name)
    if name == "split":
        return parse_split(value)
    if name == "dataloader_type":
        return value or "single"  # Megatron's default, which it sets later
    if isinstance(value, list):
        return [words.get(os.path.abspath(str(word)), word) for word in value]
    return value


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
