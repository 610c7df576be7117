"""What the data tools share: reading documents.

A *document* is the unit Megatron's datasets shuffle: one plain-text file, or one line of a
JSON-lines file. Text is read as UTF-8 exactly as it stands (no newline translation), so that
what a tokenizer decodes can be compared with what was read.
"""

import json
import logging
import warnings
from argparse import ArgumentParser
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path

from megatron_scmoe.command_line import UsageError, asks_for_help

JSON_LINES_SUFFIXES = (".jsonl", ".json")
DEFAULT_SUFFIXES = (".txt", ".jsonl")


def quiet_imports() -> None:
    """Megatron and PyTorch tell on import of what is not installed; map CUDA first, if need be."""
    from megatron_scmoe import (  # seconds, which the data tools need not wait for
        cpu,
        megatron_flags,
    )

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    if asks_for_help():
        megatron_flags.import_lightly()
        return
    cpu.enable_if_no_gpu()  # before anything of Megatron is imported


@dataclass(frozen=True)
class Document:
    """One document: where it comes from (`file` or `file:line`) and its text."""

    origin: str
    text: str


def add_input_arguments(parser: ArgumentParser) -> None:
    """The flags that say which documents to read; `find_files` and `read_documents` use them."""
    parser.add_argument(
        "--input", nargs="+", type=Path, required=True, metavar="PATH",
        help="text files, JSON-lines files (.jsonl, .json), or folders of them",
    )  # fmt: skip
    parser.add_argument(
        "--suffix", nargs="+", default=list(DEFAULT_SUFFIXES), metavar="SUFFIX",
        help="which files of an --input folder are read; a file named itself is always read",
    )  # fmt: skip
    parser.add_argument(
        "--json-key", default="text", metavar="KEY",
        help="the field of a JSON line that holds the text",
    )  # fmt: skip


def find_files(inputs: Sequence[Path], suffixes: Sequence[str] = DEFAULT_SUFFIXES) -> list[Path]:
    """The files behind `--input`: files as given, folders searched in sorted order.

    Raises UsageError for a path that does not exist and a folder with nothing to read.
    """
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = sorted(p for p in path.rglob("*") if p.name.endswith(tuple(suffixes)))
            found = [p for p in found if p.is_file()]
            if not found:
                raise UsageError(
                    f"--input {path}: no file in this folder ends in {' or '.join(suffixes)}; "
                    "name other endings with --suffix"
                )
            files += found
        elif path.is_file():
            files.append(path)
        else:
            raise UsageError(
                f"--input {path}: no such file or folder; accepted are text files, "
                "JSON-lines files and folders of them"
            )
    return files


def read_documents(files: Sequence[Path], json_key: str = "text") -> Iterator[Document]:
    """Yield the documents of `files` in order, empty ones included.

    Raises UsageError naming file (and line) where text is not UTF-8, a line is not a JSON
    object, or the object has no string under `json_key`.
    """
    for file in files:
        try:
            if file.suffix in JSON_LINES_SUFFIXES:
                yield from _read_json_lines(file, json_key)
            else:
                yield Document(str(file), _decode(file.read_bytes(), str(file)))
        except OSError as error:
            raise UsageError(f"--input {file}: cannot be read ({error.strerror})") from error


def _read_json_lines(file: Path, json_key: str) -> Iterator[Document]:
    with open(file, "rb") as stream:
        for number, raw in enumerate(stream, start=1):
            origin = f"{file}:{number}"
            line = _decode(raw, origin)
            if not line.strip():
                continue
            try:
                record = json.loads(line)
            except json.JSONDecodeError as error:
                raise UsageError(f"--input {origin}: not a JSON object ({error.msg})") from error
            text = record.get(json_key) if isinstance(record, dict) else None
            if not isinstance(text, str):
                has = ", ".join(record) if isinstance(record, dict) else type(record).__name__
                raise UsageError(
                    f"--json-key {json_key}: {origin} holds no text under it (it has: {has})"
                )
            yield Document(origin, text)


def _decode(raw: bytes, origin: str) -> str:
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise UsageError(
            f"--input {origin}: byte {error.start} is not UTF-8; accepted is UTF-8 text"
        ) from error
