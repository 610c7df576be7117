"""Prepare the demo's text, tokenizer and datasets from what every Python brings along.

    python tools/prepare_demo_data.py --output demo/data

The text is the standard library of the running interpreter: some ten megabytes of source that
need no download. In the order of a hash of their names, every 20th module is held out, whole, so
that no part of it is in training. Written below the output folder:

    train.jsonl, valid.jsonl              a module a line: {"name": ..., "text": ...}
    tokenizer.model, tokenizer.vocab      trained on train.jsonl alone
    train_text_document.bin, .idx         what --train-data-path takes
    valid_text_document.bin, .idx         what --valid-data-path takes
    stamp.json                            last; says from what the rest was made

Running it again does nothing while the stamp still fits the sources and the flags.
"""

import hashlib
import json
import os
import platform
import time
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path

from megatron_scmoe.cli.documents import Document, read_documents
from megatron_scmoe.cli.preprocess_data import (
    dataset_files,
    dataset_prefix,
    load_tokenizer,
    preprocess,
)
from megatron_scmoe.cli.process import leave_nothing_at_signals
from megatron_scmoe.cli.train_tokenizer import tokenizer_files, train_tokenizer
from megatron_scmoe.platform.command_line import OneLineParser, UsageError, run_tool, staged_outputs

VOCAB_SIZE = 2048
# One module in HELD_OUT_EVERY is kept from training. Of their text, validation reads the first
# VALID_CHARACTERS: enough for a steady mean, little enough to evaluate in seconds.
HELD_OUT_EVERY = 20
VALID_CHARACTERS = 60_000
# The tokenizer learns as well from a sample, in a fraction of the time.
TOKENIZER_CHARACTERS = 4_000_000
# Not code that people wrote to be read: tests, installed packages, tables written by scripts.
SKIPPED_FOLDERS = {
    "__pycache__", "encodings", "idle_test", "pydoc_data", "site-packages", "test", "tests",
}  # fmt: skip
SKIPPED_PREFIXES = ("_sysconfigdata",)
# Counts up when the recipe changes in a way the stamp's other fields do not show.
RECIPE = 1


@dataclass(frozen=True)
class DemoData:
    """Where the demo's data lies. `train` and `valid` are what Megatron's data flags take."""

    folder: Path

    @property
    def tokenizer(self) -> Path:
        return tokenizer_files(self.folder / "tokenizer")[0]

    @property
    def train(self) -> Path:
        return dataset_prefix(self.folder / "train")

    @property
    def valid(self) -> Path:
        return dataset_prefix(self.folder / "valid")

    @property
    def stamp(self) -> Path:
        return self.folder / "stamp.json"

    def text(self, split: str) -> Path:
        return self.folder / f"{split}.jsonl"

    def files(self) -> list[Path]:
        """Everything but the stamp."""
        return [
            self.text("train"),
            self.text("valid"),
            *tokenizer_files(self.folder / "tokenizer"),
            *dataset_files(self.folder / "train"),
            *dataset_files(self.folder / "valid"),
        ]


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Prepare the demo's text, tokenizer and datasets.")
    parser.add_argument(
        "--output", type=Path, default=Path("demo/data"), metavar="FOLDER", help="where to write"
    )
    parser.add_argument(
        "--vocab-size", type=int, default=VOCAB_SIZE, metavar="N", help="pieces of the tokenizer"
    )
    parser.add_argument(
        "--every", type=int, default=1, metavar="N", help="read one module in N, for a small corpus"
    )
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, metavar="N", help="processes"
    )
    parser.add_argument("--force", action="store_true", help="prepare even if up to date")
    args = parser.parse_args(argv)
    for flag, value in (("--workers", args.workers), ("--every", args.every)):
        if value < 1:
            raise UsageError(f"{flag} {value}: accepted is 1 or more")
    prepare(
        args.output,
        vocab_size=args.vocab_size,
        every=args.every,
        workers=args.workers,
        force=args.force,
    )


def prepare(
    folder: Path,
    *,
    vocab_size: int = VOCAB_SIZE,
    every: int = 1,
    workers: int = 1,
    force: bool = False,
) -> DemoData:
    """Write everything above below `folder`, unless it is there already; say what was done."""
    data = DemoData(folder)
    sources = find_sources(standard_library(), every)
    valid_characters = VALID_CHARACTERS // every
    recipe = describe(sources, vocab_size, valid_characters)
    if not force and is_complete(data, recipe):
        print(f"{folder}: up to date ({data.stamp})")
        return data
    started = time.perf_counter()
    with staged_outputs("--output", [*data.files(), data.stamp]) as staged:
        write_all(DemoData(staged[0].parent), sources, recipe, workers)
    print(f"{folder}: ready in {time.perf_counter() - started:.0f} s")
    return data


def write_all(data: DemoData, sources: dict[str, Path], recipe: dict, workers: int) -> None:
    """Write everything into an empty folder, the stamp last."""
    train, valid = split_documents(sources, recipe["valid_characters"])
    if not train or not valid:
        raise UsageError(
            f"--every: of {len(sources)} modules none are left for training or validation; "
            "accepted is a smaller number"
        )
    write_json_lines(data.text("train"), train)
    write_json_lines(data.text("valid"), valid)
    train_tokenizer(
        read_documents([data.text("train")]),
        data.folder / "tokenizer",
        vocab_size=recipe["vocab_size"],
        max_characters=TOKENIZER_CHARACTERS,
    )
    tokenizer = load_tokenizer(data.tokenizer)
    for split in ("train", "valid"):
        summary = preprocess(
            read_documents([data.text(split)]),
            tokenizer,
            data.folder / split,
            workers=workers,
            description=f"tokenizing {split}",
        )
        print(f"{split}: {summary.documents} modules, {summary.tokens:,} tokens")
    write_stamp(data, recipe)


def standard_library() -> Path:
    """The folder of the running interpreter's standard library."""
    return Path(os.__file__).resolve().parent


def find_sources(library: Path, every: int = 1) -> dict[str, Path]:
    """One module in `every`, by name relative to `library`, in sorted order."""
    sources = {}
    for path in sorted(library.rglob("*.py")):
        relative = path.relative_to(library)
        if SKIPPED_FOLDERS.isdisjoint(relative.parts) and not path.name.startswith(
            SKIPPED_PREFIXES
        ):
            sources[relative.as_posix()] = path
    if not sources:
        raise UsageError(f"{library}: this Python has no standard library in source form")
    return dict(list(sources.items())[::every])


def split_documents(
    sources: dict[str, Path], valid_characters: int
) -> tuple[list[Document], list[Document]]:
    """(training, validation) documents; files that are empty or not UTF-8 are left out."""
    documents = []
    for name, path in sources.items():
        try:
            text = path.read_bytes().decode("utf-8")
        except UnicodeDecodeError:
            continue
        if text:
            documents.append(Document(name, text))
    documents.sort(key=lambda document: hashlib.sha256(document.origin.encode()).digest())
    held_out = documents[::HELD_OUT_EVERY]
    train = [document for i, document in enumerate(documents) if i % HELD_OUT_EVERY]
    valid, room = [], valid_characters
    for document in held_out:
        if room > 0:
            valid.append(Document(document.origin, document.text[:room]))
            room -= len(document.text)
    return train, valid


def write_json_lines(path: Path, documents: Iterable[Document]) -> None:
    """One document a line: {"name": ..., "text": ...}."""
    with open(path, "w") as stream:
        stream.writelines(
            json.dumps({"name": document.origin, "text": document.text}) + "\n"
            for document in documents
        )


def describe(sources: dict[str, Path], vocab_size: int, valid_characters: int) -> dict:
    """What the data depends on; equal descriptions give equal data."""
    listing = "".join(f"{name} {path.stat().st_size}\n" for name, path in sources.items())
    return {
        "recipe": RECIPE,
        "python": platform.python_version(),
        "modules": len(sources),
        "sources": hashlib.sha256(listing.encode()).hexdigest(),
        "vocab_size": vocab_size,
        "held_out_every": HELD_OUT_EVERY,
        "valid_characters": valid_characters,
        "tokenizer_characters": TOKENIZER_CHARACTERS,
    }


def is_complete(data: DemoData, recipe: dict) -> bool:
    """Whether the stamp fits `recipe` and every file has the size it was written with."""
    try:
        stamp = json.loads(data.stamp.read_text())
        return stamp["made_from"] == recipe and stamp["sizes"] == _sizes(data)
    except (OSError, ValueError, KeyError, TypeError):
        return False


def write_stamp(data: DemoData, recipe: dict) -> None:
    """Say from what the files were made, and how large they are."""
    data.stamp.write_text(json.dumps({"made_from": recipe, "sizes": _sizes(data)}, indent=2) + "\n")


def _sizes(data: DemoData) -> dict[str, int]:
    return {path.name: path.stat().st_size for path in data.files()}


if __name__ == "__main__":
    leave_nothing_at_signals()
    run_tool(main)
