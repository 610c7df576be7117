"""What the data tools share: reading documents, errors of one line, outputs written whole or not.

A *document* is the unit Megatron's datasets shuffle: one plain-text file, or one line of a
JSON-lines file. Text is read as UTF-8 exactly as it stands (no newline translation), so that
what a tokenizer decodes can be compared with what was read.
"""

import argparse
import json
import logging
import os
import shutil
import sys
import tempfile
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

JSON_LINES_SUFFIXES = (".jsonl", ".json")
DEFAULT_SUFFIXES = (".txt", ".jsonl")


class UsageError(Exception):
    """A wrong request: the message is one line that names the flag and what is accepted."""


class OneLineParser(argparse.ArgumentParser):
    """An ArgumentParser whose errors take one line, defaults shown in `--help`."""

    def __init__(self, **kwargs):
        super().__init__(formatter_class=_HelpFormatter, **kwargs)

    def error(self, message: str) -> NoReturn:
        self.exit(2, f"{self.prog}: error: {message} (see {self.prog} --help)\n")


def run_tool(main: Callable[[], None]) -> NoReturn:
    """Run a command line and end the process: 0 done, 1 failed, 2 wrong request, 130 Ctrl-C."""
    prog = Path(sys.argv[0]).name
    try:
        main()
    except UsageError as error:
        sys.exit(_say(f"{prog}: error: {error}", status=2))
    except OSError as error:
        sys.exit(_say(f"{prog}: error: {error.filename or ''} {error.strerror or error}", status=1))
    except KeyboardInterrupt:
        sys.exit(_say(f"{prog}: interrupted", status=130))
    sys.exit(0)


def quiet_imports() -> None:
    """Megatron and PyTorch tell on import of what is not installed; map CUDA first, if need be."""
    from megatron_scmoe import cpu  # seconds, which the data tools need not wait for

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    cpu.enable_if_no_gpu()  # before anything of Megatron is imported


@dataclass(frozen=True)
class Document:
    """One document: where it comes from (`file` or `file:line`) and its text."""

    origin: str
    text: str


def add_input_arguments(parser: argparse.ArgumentParser) -> None:
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


def refuse_overwrite(flag: str, outputs: Sequence[Path], force: bool) -> None:
    """Raise UsageError if an output exists and `--force` was not given."""
    existing = [path for path in outputs if path.exists()]
    if existing and not force:
        raise UsageError(f"{flag}: {existing[0]} exists; give another {flag} or --force")


@contextmanager
def staged_outputs(flag: str, outputs: Sequence[Path]) -> Iterator[list[Path]]:
    """Paths to write to, moved to `outputs` when the block ends well, removed when it does not.

    The staging folder lies beside the outputs, so that moving is a rename. Old outputs go first:
    an interruption can leave some missing, never a mixture of old and new.
    """
    folder = outputs[0].parent
    try:
        folder.mkdir(parents=True, exist_ok=True)
        staging = Path(tempfile.mkdtemp(prefix=".staging-", dir=folder))
    except OSError as error:
        raise UsageError(f"{flag}: cannot write in {folder} ({error.strerror})") from error
    try:
        staged = [staging / path.name for path in outputs]
        yield staged
        for path in outputs:
            path.unlink(missing_ok=True)
        for source, target in zip(staged, outputs, strict=True):
            os.replace(source, target)
    finally:
        shutil.rmtree(staging, ignore_errors=True)


class _HelpFormatter(argparse.ArgumentDefaultsHelpFormatter):
    """Shows defaults, but for flags that have none to speak of."""

    def _get_help_string(self, action: argparse.Action) -> str | None:
        has_default = action.default not in (None, False)
        return super()._get_help_string(action) if has_default else action.help


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


def _say(message: str, status: int) -> int:
    print(message, file=sys.stderr)
    return status
