"""Files and folders that the flags name, checked before a process group or a model exists.

What is wrong with them is said in one line that names the flag, instead of minutes later in a stack
trace of every rank. The checks are cheap whatever the size of the data: sizes, headers, and bounded
samples.

The first rank alone checks, as thousands of ranks would keep a file system busy with it. The others
go on to the rendezvous; if the first one stops, the launcher ends them there.
"""

import copy
import math
import os
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from megatron.core.tokenizers.utils.build_tokenizer import SP_TOKENIZERS, build_tokenizer
from megatron.training.utils import get_blend_and_blend_per_split

from megatron_scmoe.analysis.simulator import OperatorTimes, OperatorTimesError
from megatron_scmoe.checkpoints import locate
from megatron_scmoe.errors import InputError, reason_of
from megatron_scmoe.platform.megatron_flags import TUNE_FLAG, tune_file
from megatron_scmoe.training.indexed_dataset import MEGATRON_SPLIT, IndexedDataset

SAMPLE = 4_000_000
"""Tokens of a dataset that are looked at: beginning, middle and end."""

SAMPLE_OF_ALL = 64_000_000
"""Tokens looked at in all datasets of a blend together."""


def prefixes(args) -> list[str]:
    """The local datasets that the flags name.

    Raises:
        InputError: if the flags cannot be understood.
    """
    return [dataset.prefix for dataset in _datasets(args)]


def check_files(args) -> None:
    """Check what the flags name; to be called before Megatron acts on ``args``.

    Raises:
        InputError: at the first file or folder that cannot serve.
    """
    if args.rank != 0:
        return
    to_split = []
    for dataset in _datasets(args):
        _, starts = dataset.check()
        if dataset.is_split:
            to_split.append((dataset, starts))
        if args.data_cache_path is None:
            _check_cache_beside(dataset)
        _remove_cut_indices(args.data_cache_path or f"{dataset.prefix}/cache")
    _check_split(MEGATRON_SPLIT if args.split is None else args.split, to_split)
    if not args.use_checkpoint_args:  # they name another tokenizer
        _check_tokenizer(args)
    _check_checkpoint(args)
    _check_vocabulary(args)
    for flag in ("--save", "--data-cache-path", "--tensorboard-dir"):
        if _value(args, flag) is not None:
            _check_writable(flag, _value(args, flag))
    _check_operator_times(args)
    if (file := tune_file(args)) is not None and not Path(file).exists():
        _check_writable(TUNE_FLAG, str(Path(file).absolute().parent))


def names_data(args) -> bool:
    """Whether any flag says where the data is."""
    return any(_value(args, flag) for flags in _SOURCES for flag in flags)


def make_paths_absolute(args) -> None:
    """Name the files of the tokenizer from the root: a checkpoint stores them for any other folder.

    What is no file or folder here is left as it is: a name on the Hugging Face Hub, for example.
    """
    for name in ("tokenizer_model", "vocab_file", "merge_file"):
        path = getattr(args, name)
        if path is not None and os.path.exists(path):
            setattr(args, name, os.path.abspath(path))


def check_tokens(args, tokenizer) -> None:
    """Check that the tokenizer's vocabulary has the ids that the data has (a sample of them).

    Raises:
        InputError: at the first dataset with an id that the tokenizer does not have.
    """
    if args.rank != 0:
        return
    datasets = list(_datasets(args))
    size, rows = tokenizer.vocab_size, args.padded_vocab_size
    if rows < size:
        raise InputError(
            f"--padded-vocab-size {rows}",
            f"the vocabulary of {_given_tokenizer(args)} has {size} ids",
            f"{size} or more, or leave the flag out",
        )
    for dataset in datasets:
        found = dataset.find_token_outside(size, min(SAMPLE, SAMPLE_OF_ALL // len(datasets)))
        if found is not None:
            position, token = found
            raise InputError(
                dataset.given,
                f"token {position} of {dataset.bin} has the id {token}, but the vocabulary of "
                f"{_given_tokenizer(args)} has {size} ids",
                f"the tokenizer that the data was made with, or data with ids from 0 to {size - 1}",
            )


def _datasets(args) -> Iterator[IndexedDataset]:
    """The datasets that the flags name."""
    source = _data_source(args)
    if source in (None, "--mock-data"):
        return
    in_file = source in _LISTS
    given = f"{source} {_value(args, source)}" if in_file else source
    try:
        blend, per_split = get_blend_and_blend_per_split(args)
    except OSError as error:
        raise InputError(given, reason_of(error), "a readable file") from error
    except AssertionError as error:
        raise InputError(given, "weights and prefixes do not alternate", _BLEND) from error
    except (KeyError, TypeError, ValueError) as error:
        wanted, reason = _LISTS.get(source, _BLEND), reason_of(error)
        if isinstance(error, KeyError):
            reason = f"the key {reason} is missing"
        raise InputError(given, f"cannot be parsed ({reason})", wanted) from error
    splits = ("", "train-", "valid-", "test-")
    for split, part in zip(splits, (blend, *(per_split or ()))):
        _check_weights(part[1] if part else None, given if in_file else f"--{split}data-path")
        for prefix in part[0] if part else ():
            flag = given if in_file else f"--{split}data-path {prefix}"
            if "://" not in prefix:  # object storage is left to its own library
                yield IndexedDataset(flag, prefix, is_split=part is blend)
            elif args.object_storage_cache_path is None:
                raise InputError(
                    flag,
                    "its index is copied here, and there is no folder for it",
                    "--object-storage-cache-path FOLDER with it",
                )


_BLEND = "PREFIX ..., or WEIGHT PREFIX ... with a weight for each"
_LISTS = {
    "--data-args-path": f"a file with {_BLEND}",
    "--per-split-data-args-path": (
        'a JSON file {"train": [PREFIX, ...], "valid": ..., "test": ...}, null where there is none'
    ),
}
_OF_PARTS = ("--train-data-path", "--valid-data-path", "--test-data-path")
_SOURCES = (
    ("--mock-data",),
    ("--data-path",),
    _OF_PARTS,
    *((flag,) for flag in _LISTS),
)


def _check_weights(weights: list[float] | None, given: str) -> None:
    """Refuse weights of a blend from which Megatron can draw nothing."""
    for weight in weights or ():
        if not 0 < weight < math.inf:
            raise InputError(f"{given}: the weight {weight:g}", "nothing is drawn by it", "above 0")


def _data_source(args) -> str | None:
    """The (first) flag that says where the data is; None if a checkpoint is converted without."""
    first = (next((f for f in flags if _value(args, f)), None) for flags in _SOURCES)
    given = [flag for flag in first if flag is not None]
    if len(given) > 1:
        raise InputError(" with ".join(given), "the data is named twice", "one of them")
    if not given and args.ckpt_convert_format is None:
        raise InputError(
            "no data is given",
            "there is nothing to train on",
            "--data-path PREFIX, --train-data-path PREFIX (and valid, test), or --mock-data",
        )
    source = given[0] if given else None
    if source in _OF_PARTS[1:] and not args.skip_train:
        raise InputError(
            f"{source} {' '.join(_value(args, source))}",
            "there is nothing to train on",
            "--train-data-path PREFIX with it, or --skip-train",
        )
    if args.split is not None and source in (*_OF_PARTS, "--per-split-data-args-path"):
        raise InputError(
            f"--split {args.split} with {source}", "that names the data of each part", "one of them"
        )
    return source


def _value(args, flag: str):
    return getattr(args, flag[2:].replace("-", "_"))


def _check_split(split: str, datasets: list[tuple[IndexedDataset, np.ndarray]]) -> None:
    """Refuse a part without a token: Megatron would go round in it for ever."""
    for dataset, starts in datasets:
        part = dataset.part_without_token(split, starts)
        if part is not None:
            raise InputError(
                dataset.given,
                f"no token of its {starts.size} sequences falls to the {part} part of --split {split}",
                f"more documents, or {_nearest_split(split, datasets)}",
            )


def _nearest_split(split: str, datasets: list[tuple[IndexedDataset, np.ndarray]]) -> str:
    """The flags of a split that gives every part of every dataset some tokens.

    Without the part for tests; else one sequence of the smallest dataset for validation; else none,
    and then there is nothing to evaluate on.
    """
    train, valid, *_ = (*re.findall(r"[.0-9]+", split), "0")  # as Megatron reads it
    smallest = min(starts.size for _, starts in datasets)
    for wanted in (f"{train},{valid},0", f"{smallest - 1},1,0"):
        both = float(wanted.split(",")[0]) > 0 and float(wanted.split(",")[1]) > 0
        if both and not any(d.part_without_token(wanted, starts) for d, starts in datasets):
            return f"--split {wanted}"
    return "--split 1,0,0 --eval-iters 0"


def _check_cache_beside(dataset: IndexedDataset) -> None:
    """Without --data-cache-path, Megatron keeps the order of the samples in PREFIX/cache."""
    folder = os.path.dirname(dataset.prefix) or "."
    if not os.path.isdir(f"{dataset.prefix}/cache") and not os.access(folder, os.W_OK):
        raise InputError(
            dataset.given,
            f"cannot write the order of the samples into {dataset.prefix}/cache",
            "--data-cache-path FOLDER with a writable folder",
        )


def _remove_cut_indices(folder: str) -> None:
    """Megatron takes every index that is there. Those that a run left half-written are built anew."""
    for file in Path(folder).glob("*.npy"):
        try:
            np.load(file, mmap_mode="r")
        except (ValueError, EOFError):
            file.unlink()
            print(f"WARNING: {file} is cut off; it is built anew", flush=True)


def _given_tokenizer(args) -> str:
    model = f" --tokenizer-model {args.tokenizer_model}" if args.tokenizer_model else ""
    return f"--tokenizer-type {args.tokenizer_type}{model}"


def _check_tokenizer(args) -> None:
    """Load the tokenizer once, since Megatron's own attempt ends in a stack trace."""
    given, model = _given_tokenizer(args), args.tokenizer_model
    if args.tokenizer_type is None:
        raise InputError(
            "--tokenizer-type is not given",
            "the vocabulary has no size",
            "SentencePieceTokenizer, HuggingFaceTokenizer, ... (see --help)",
        )
    accepted = "the tokenizer that the data was made with"
    if args.tokenizer_type in (*SP_TOKENIZERS, "TikTokenizer"):
        if model is None:
            raise InputError(given, "--tokenizer-model is not given", accepted)
        if not os.path.isfile(model):
            raise InputError(given, "there is no such file", accepted)
    trial = copy.copy(args)
    trial.pad_vocab_size = False
    try:
        build_tokenizer(trial)
    except Exception as error:  # its library may raise anything
        reason = str(error).strip().split("\n")[0] or type(error).__name__
        raise InputError(given, f"it cannot be loaded ({reason})", accepted) from error


def _check_vocabulary(args) -> None:
    """Check that the ranks can share the rows of a vocabulary that a checkpoint or a flag fixes."""
    rows, ranks = args.padded_vocab_size, args.tensor_model_parallel_size
    if rows is not None and rows % ranks:
        raise InputError(
            f"--tensor-model-parallel-size {ranks}",
            f"the vocabulary has {rows} rows, padding included",
            f"a divisor of {rows}, or a checkpoint converted with --target-tensor-parallel {ranks}",
        )


def _check_checkpoint(args) -> None:
    """Check that the checkpoint to load, if there is one, is complete."""
    if args.non_persistent_ckpt_type is not None:
        return  # there are two, and which is newer is only known to Megatron
    if named := locate.named_checkpoint(args):
        path = locate.find_checkpoint(*named, args.ckpt_step or None, args.ckpt_format)
        finds_out = args.ckpt_format != "torch" or args.auto_detect_ckpt_format
        if locate.is_distributed(path) and not finds_out:
            raise InputError(
                f"--ckpt-format torch with {' '.join(named)}",
                f"{path} is of torch_dist",
                "--ckpt-format torch_dist, or --auto-detect-ckpt-format with it",
            )


def _check_operator_times(args) -> None:
    """The file is read if it exists, and written otherwise."""
    flag = "--scmoe-operator-times"
    path = _value(args, flag)
    if path is None:
        return
    if not Path(path).exists():
        _check_writable(flag, str(Path(path).absolute().parent))
        return
    try:
        OperatorTimes.read(path)
    except OperatorTimesError as error:
        raise InputError(
            f"{flag} {error}",
            "it does not hold operator times",
            "a file that this flag has written",
        ) from error


def _check_writable(flag: str, folder: str) -> None:
    """Try to write where ``folder`` is or would be; leaves nothing behind."""
    if "://" in folder:
        return
    existing = Path(folder).absolute()
    while not existing.exists() and existing != existing.parent:
        existing = existing.parent
    try:
        with tempfile.TemporaryFile(dir=existing):
            pass
    except OSError as error:
        raise InputError(
            f"{flag} {folder}", f"cannot write there ({error.strerror})", "a writable folder"
        ) from error
