"""Tokenize text into the indexed dataset that Megatron trains from.

    scmoe preprocess-data --input corpus/ --tokenizer-model tok/code.model \
        --output-prefix data/code --workers 4

writes `data/code_text_document.bin` and `.idx`, for `--data-path data/code_text_document` (or
`--train-data-path`, `--valid-data-path`). A text file is one document, as is each line of a
JSON-lines file; each ends with the tokenizer's end-of-document token. The format is Megatron's: its
`IndexedDatasetBuilder` writes it.
"""

import argparse
import logging
import os
import signal
import sys
import time
import warnings
from collections import deque
from collections.abc import Iterable, Iterator
from concurrent.futures import Future, ProcessPoolExecutor
from concurrent.futures.process import BrokenProcessPool
from dataclasses import dataclass
from itertools import batched
from multiprocessing import get_context
from pathlib import Path
from typing import Any

import numpy as np
from tqdm import tqdm

from megatron_scmoe.cli import program
from megatron_scmoe.cli.documents import (
    BadLines,
    Document,
    add_input_arguments,
    find_files,
    no_text,
    read_documents,
)
from megatron_scmoe.platform.command_line import (
    OneLineParser,
    UsageError,
    file_prefix,
    refuse_overwrite,
    staged_outputs,
)

# --tokenizer-type as Megatron names it -> the library Megatron's tokenizer is built on.
TOKENIZER_LIBRARIES = {
    "SentencePieceTokenizer": "sentencepiece",
    "HuggingFaceTokenizer": "huggingface",
}
# A batch is what travels to a worker at once; only a few are under way, so that memory stays
# bounded whatever the size of the corpus.
DOCUMENTS_PER_BATCH = 16
BATCHES_PER_WORKER = 4
MOST_WORKERS = 256


@dataclass(frozen=True)
class Summary:
    """What `preprocess` wrote."""

    prefix: Path  # what Megatron's --data-path takes: the .bin and .idx without their suffix
    documents: int
    empty: int  # documents without a token, left out
    tokens: int
    dtype: str


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Tokenize text into Megatron's indexed dataset.")
    add_input_arguments(parser)
    parser.add_argument(
        "--output-prefix", type=file_prefix, required=True, metavar="PREFIX",
        help="writes PREFIX_<json-key>_document.bin and .idx",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer-type", choices=list(TOKENIZER_LIBRARIES), default="SentencePieceTokenizer",
        help="as in Megatron",
    )  # fmt: skip
    parser.add_argument(
        "--tokenizer-model", required=True, metavar="MODEL",
        help="a SentencePiece .model file, or a Hugging Face folder or name",
    )  # fmt: skip
    parser.add_argument(
        "--append-eod", action=argparse.BooleanOptionalAction, default=True,
        help="end each document with the tokenizer's end-of-document token",
    )  # fmt: skip
    parser.add_argument("--workers", type=int, default=1, metavar="N", help="processes")
    parser.add_argument("--force", action="store_true", help="overwrite an existing dataset")
    args = parser.parse_args(argv)

    if "/" in args.json_key:
        raise UsageError(
            f"--json-key {args.json_key}: the dataset's files are named by it; accepted is a key "
            "without /"
        )
    refuse_overwrite(
        "--output-prefix", dataset_files(args.output_prefix, args.json_key), args.force
    )
    if not 1 <= args.workers <= MOST_WORKERS:
        raise UsageError(f"--workers {args.workers}: accepted is 1 to {MOST_WORKERS}")
    files = find_files(args.input, args.suffix)
    if argv is None:
        _be_light()
    tokenizer = load_tokenizer(args.tokenizer_model, args.tokenizer_type)
    started = time.perf_counter()
    bad_lines = BadLines(skip=args.skip_bad_lines)
    summary = preprocess(
        read_documents(files, args.json_key, bad_lines),
        tokenizer,
        args.output_prefix,
        key=args.json_key,
        append_eod=args.append_eod,
        workers=args.workers,
        bad_lines=bad_lines,
    )
    if bad_lines.count:
        print(bad_lines.summary())
    left_out = f" ({summary.empty:,} empty documents left out)" if summary.empty else ""
    print(
        f"wrote {summary.prefix}.bin and .idx: {summary.documents:,} documents{left_out}, "
        f"{summary.tokens:,} tokens as {summary.dtype}, {time.perf_counter() - started:.1f} s"
    )


def dataset_prefix(prefix: Path, key: str = "text") -> Path:
    """What Megatron's `--data-path` takes, named as Megatron's own tool names it."""
    return Path(f"{prefix}_{key}_document")


def dataset_files(prefix: Path, key: str = "text") -> list[Path]:
    """The data and the index file of a dataset."""
    return [Path(f"{dataset_prefix(prefix, key)}{suffix}") for suffix in (".bin", ".idx")]


def load_tokenizer(model: str | Path, tokenizer_type: str = "SentencePieceTokenizer"):
    """Megatron's own tokenizer object, the one that training builds from the same two flags."""
    accepted = {
        "SentencePieceTokenizer": "a .model file written by SentencePiece",
        "HuggingFaceTokenizer": "a folder or name of a Hugging Face tokenizer",
    }[tokenizer_type]
    if tokenizer_type == "SentencePieceTokenizer" and not Path(model).is_file():
        raise UsageError(f"--tokenizer-model {model}: no such file; accepted is {accepted}")
    tokenizers = _import_megatron().tokenizers
    try:
        return tokenizers.MegatronTokenizer.from_pretrained(
            tokenizer_path=str(model),
            metadata_path={"library": TOKENIZER_LIBRARIES[tokenizer_type]},
        )
    except (RuntimeError, OSError, ValueError) as error:
        reason = str(error).strip().split("\n")[0]
        raise UsageError(
            f"--tokenizer-model {model}: cannot be loaded ({reason}); accepted is {accepted}"
        ) from error


def preprocess(
    documents: Iterable[Document],
    tokenizer,
    prefix: Path,
    *,
    key: str = "text",
    append_eod: bool = True,
    workers: int = 1,
    description: str = "tokenizing",
    bad_lines: BadLines | None = None,
) -> Summary:
    """Tokenize `documents` in order and write PREFIX_<key>_document.bin and .idx.

    `bad_lines` is what `read_documents` counts in, if it does. Raises UsageError when there is no
    token at all, or an id does not fit the data type that Megatron chooses for the size of the
    vocabulary; nothing is written then.
    """
    indexed = _import_megatron().datasets.indexed_dataset
    dtype = indexed.DType.optimal_dtype(tokenizer.vocab_size)
    eod = _end_of_document(tokenizer) if append_eod else None
    limit = min(tokenizer.vocab_size, np.iinfo(dtype).max + 1)
    encoder = _Encoder(tokenizer, eod, limit, dtype)
    counts = {"documents": 0, "empty": 0, "tokens": 0}
    with staged_outputs("--output-prefix", dataset_files(prefix, key)) as (bin_file, idx_file):
        builder = indexed.IndexedDatasetBuilder(str(bin_file), dtype=dtype)
        with tqdm(desc=description, unit=" tokens", unit_scale=True, disable=None) as progress:
            for ids in _encode_all(encoder, documents, workers):
                if ids.size == 0:
                    counts["empty"] += 1
                    continue
                builder.add_document(ids, [ids.size])
                counts["documents"] += 1
                counts["tokens"] += ids.size
                progress.update(ids.size)
        if not counts["documents"]:
            raise no_text(bad_lines)
        builder.finalize(str(idx_file))
    return Summary(dataset_prefix(prefix, key), dtype=dtype.__name__, **counts)


@dataclass(frozen=True)
class _Encoder:
    tokenizer: Any  # Megatron's
    eod: int | None
    limit: int  # ids lie in 0 <= id < limit
    dtype: type[np.number]

    def __call__(self, batch: tuple[Document, ...]) -> list[np.ndarray]:
        return [self.encode(document) for document in batch]

    def encode(self, document: Document) -> np.ndarray:
        ids = self.tokenizer.tokenize(document.text)
        if ids and self.eod is not None:
            ids.append(self.eod)
        if ids and (min(ids) < 0 or max(ids) >= self.limit):
            raise UsageError(
                f"--tokenizer-model: token id {max(ids)} of {document.origin} does not fit "
                f"{self.dtype.__name__}; accepted are ids from 0 to {self.limit - 1} "
                f"(the vocabulary has {self.tokenizer.vocab_size})"
            )
        if len(ids) > np.iinfo(np.int32).max:
            raise UsageError(
                f"--input {document.origin}: it has {len(ids):,} tokens; accepted are documents of "
                f"up to {np.iinfo(np.int32).max:,}, the limit of Megatron's index"
            )
        return np.array(ids, dtype=self.dtype)


# The encoder of a worker process. Workers are forked, so they inherit the loaded tokenizer and
# import nothing again.
_worker_encoder: _Encoder | None = None


def _encode_all(
    encoder: _Encoder, documents: Iterable[Document], workers: int
) -> Iterator[np.ndarray]:
    """The token ids of each document, in order, whatever the number of workers."""
    global _worker_encoder
    batches = batched(documents, DOCUMENTS_PER_BATCH)
    if workers == 1:
        for batch in batches:
            yield from encoder(batch)
        return
    _worker_encoder = encoder
    pending: deque[Future[list[np.ndarray]]] = deque()
    try:
        with ProcessPoolExecutor(workers, get_context("fork"), _ignore_interrupt) as pool:
            for batch in batches:
                pending.append(pool.submit(_encode_in_worker, batch))
                if len(pending) >= workers * BATCHES_PER_WORKER:
                    yield from pending.popleft().result()
            while pending:
                yield from pending.popleft().result()
    except BrokenProcessPool as error:
        raise UsageError(
            f"--workers {workers}: a worker died (out of memory?); try a smaller number"
        ) from error
    finally:
        _worker_encoder = None


def _encode_in_worker(batch: tuple[Document, ...]) -> list[np.ndarray]:
    assert _worker_encoder is not None  # set before the workers were forked
    return _worker_encoder(batch)


def _ignore_interrupt() -> None:
    # Ctrl-C reaches the whole process group; the parent alone answers it.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    os.environ["TOKENIZERS_PARALLELISM"] = "false"


def _be_light() -> None:
    """In a process that does nothing else: no compiler of kernels is needed here."""
    from megatron_scmoe.platform import megatron_flags

    megatron_flags.import_lightly()


def _import_megatron():
    """megatron.core with the two parts used here.

    Imported late, as it takes seconds that `--help` and a wrong flag need not wait for; and
    quietly, as what it says about missing GPU libraries is of no interest to a tokenizer.
    """
    import torch

    from megatron_scmoe.platform import cpu_backend

    if not torch.cuda.is_available():  # a login node, with what the GPU nodes need installed
        cpu_backend.hide_gpu_packages()
    logging.getLogger("torch.utils.cpp_extension").setLevel(logging.ERROR)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        import megatron.core
        import megatron.core.datasets.indexed_dataset
        import megatron.core.tokenizers
    return megatron.core


def _end_of_document(tokenizer) -> int:
    eod = tokenizer.eod
    if eod is None or eod < 0:
        raise UsageError(
            "--append-eod: the tokenizer has no end-of-document token (SentencePiece's eos); "
            "accepted is --no-append-eod, or a tokenizer that has one"
        )
    return eod


if __name__ == "__main__":
    program.main(["preprocess-data", *sys.argv[1:]])
