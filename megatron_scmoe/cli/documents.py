"""Reading documents, for the commands that take text: what their --input names.

A *document* is the unit Megatron's datasets shuffle: one plain-text file, or one line of a
JSON-lines file. Text is read as UTF-8 exactly as it stands (no newline translation; a byte-order
mark at the beginning of a file is no text), so that what a tokenizer decodes can be compared with
what was read.
"""

import bz2
import gzip
import io
import json
import lzma
import os
import zlib
from argparse import ArgumentParser
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NoReturn

from megatron_scmoe.platform.command_line import UsageError

JSON_LINES_SUFFIXES = (".jsonl", ".ndjson", ".json")
DEFAULT_SUFFIXES = (".txt", ".jsonl")
COMPRESSED: dict[str, Callable] = {".gz": gzip.open, ".bz2": bz2.open, ".xz": lzma.open}
"""What opens a compressed file, by the ending of its name."""

_ZSTANDARD = ".zst"
BYTE_ORDER_MARK = b"\xef\xbb\xbf"
_SHOWN_KEYS = 8


@dataclass(frozen=True)
class Document:
    """One document: where it comes from (`file` or `file:line`) and its text."""

    origin: str
    text: str


@dataclass
class BadLines:
    """The lines that hold no text: refused at the first one, or left out and counted."""

    skip: bool = False
    count: int = 0
    first: str = ""

    def found(self, where: str, reason: str, accepted: str) -> None:
        """Take note of a line that cannot be read.

        Args:
            where: the flag that led to the line, and the line.

        Raises:
            UsageError: unless such lines are to be left out.
        """
        if not self.skip:
            raise UsageError(
                f"{where}: {reason}; accepted is {accepted}, or --skip-bad-lines to leave such "
                "lines out"
            )
        self.count += 1
        self.first = self.first or f"{where}: {reason}"

    def summary(self) -> str:
        """How many lines were left out, and why the first one was; empty if there was none."""
        if not self.count:
            return ""
        lines = "line" if self.count == 1 else "lines"
        return _printable(f"left out {self.count:,} bad {lines}; the first: {self.first}")


class BadLine(Exception):
    """Why a line holds no text, and what would."""


def add_input_arguments(parser: ArgumentParser) -> None:
    """The flags that say which documents to read; `find_files` and `read_documents` use them."""
    parser.add_argument(
        "--input", nargs="+", type=Path, required=True, metavar="PATH",
        help="text files, JSON-lines files (.jsonl, .ndjson, .json), either of them compressed "
        "(.gz, .bz2, .xz), or folders of them; a text file is one document, and so is a JSON line",
    )  # fmt: skip
    parser.add_argument(
        "--suffix", nargs="+", default=list(DEFAULT_SUFFIXES), metavar="SUFFIX",
        help="which files of an --input folder are read, compressed ones as well; a file named "
        "itself is always read",
    )  # fmt: skip
    parser.add_argument(
        "--json-key", default="text", metavar="KEY",
        help="the field of a JSON line that holds the text",
    )  # fmt: skip
    parser.add_argument(
        "--skip-bad-lines", action="store_true",
        help="leave out lines that are not UTF-8, not JSON or without text under --json-key, "
        "and say at the end how many",
    )  # fmt: skip


def find_files(inputs: Sequence[Path], suffixes: Sequence[str] = DEFAULT_SUFFIXES) -> list[Path]:
    """The files behind `--input`: files as given, folders searched in sorted order.

    Raises UsageError for a path that does not exist or is no file, given or found, and a folder with
    nothing to read.
    """
    endings = tuple(
        suffix.lower() + packed for suffix in suffixes for packed in ("", *COMPRESSED, _ZSTANDARD)
    )
    files: list[Path] = []
    for path in inputs:
        if path.is_dir():
            found = [file for file in _files_below(path) if file.name.lower().endswith(endings)]
            if not found:
                raise UsageError(
                    f"--input {path}: no file in this folder ends in {' or '.join(suffixes)}; "
                    "name other endings with --suffix"
                )
        else:
            found = [path]
        for file in found:
            _check_is_file(file)
        files += found
    return files


def _files_below(folder: Path) -> list[Path]:
    """All that is no folder, in order; behind links too, where each folder is read once."""
    found: list[Path] = []
    seen = {folder.resolve()}
    for here, folders, names in os.walk(folder, onerror=_refuse_folder, followlinks=True):
        paths = {Path(here, name).resolve(): name for name in sorted(folders, reverse=True)}
        folders[:] = sorted(name for path, name in paths.items() if path not in seen)
        seen |= paths.keys()
        found += [Path(here, name) for name in names]
    return sorted(found)


def _refuse_folder(error: OSError) -> NoReturn:
    raise UsageError(f"--input {error.filename}: cannot be read ({error.strerror})") from error


def _check_is_file(path: Path) -> None:
    accepted = "accepted are text files, JSON-lines files and folders of them"
    if path.is_file():
        return
    if path.is_symlink() and not path.exists():
        raise UsageError(f"--input {path}: a link to what is not there; {accepted}")
    if path.exists():
        raise UsageError(f"--input {path}: a pipe or a device, no file; {accepted}")
    raise UsageError(f"--input {path}: no such file or folder; {accepted}")


def read_documents(
    files: Sequence[Path], json_key: str = "text", bad_lines: BadLines | None = None
) -> Iterator[Document]:
    """Yield the documents of `files` in order, empty ones included.

    `bad_lines` says what to do with a line that is not UTF-8, or that is not a JSON object with
    a string under `json_key`, and counts them; by default the first one raises UsageError, which
    names file and line. A file that cannot be read, or is cut off, always does.
    """
    bad_lines = bad_lines or BadLines()
    for file in files:
        try:
            if _bare_suffix(file) in JSON_LINES_SUFFIXES:
                yield from _read_json_lines(file, json_key, bad_lines)
            else:
                yield _read_text(file, json_key, bad_lines)
        except (OSError, EOFError, lzma.LZMAError, zlib.error) as error:
            reason = getattr(error, "strerror", None) or error
            raise UsageError(f"--input {file}: cannot be read ({reason})") from error


def no_text(bad_lines: BadLines | None = None) -> UsageError:
    """What to raise where the documents hold nothing, as all lines were bad or all files empty."""
    left_out = bad_lines.summary() if bad_lines else ""
    return UsageError("--input: there is no text in it" + (f" ({left_out})" if left_out else ""))


def _bare_suffix(file: Path) -> str:
    """The ending of a name, without that of its compression."""
    name = Path(file.name.lower())
    return Path(name.stem).suffix if name.suffix in COMPRESSED else name.suffix


def _open(file: Path):
    packed = file.suffix.lower()
    if packed == _ZSTANDARD:
        raise UsageError(
            f"--input {file}: Zstandard is not read here; accepted are files unpacked by zstd -d --rm, "
            f"or {', '.join(COMPRESSED)}"
        )
    return COMPRESSED.get(packed, open)(file, "rb")


def _read_text(file: Path, json_key: str, bad_lines: BadLines) -> Document:
    with _open(file) as stream:
        raw = stream.read().removeprefix(BYTE_ORDER_MARK)
    _refuse_json_lines(file, raw, json_key)
    try:
        return Document(str(file), decode(raw))
    except BadLine:
        return Document(str(file), "".join(_good_lines(file, raw, bad_lines)))


def _refuse_json_lines(file: Path, raw: bytes, json_key: str) -> None:
    """Under another name: keys, quotes and escapes would be text, and all of it one document."""
    first = next((line for line in io.BytesIO(raw) if line.strip()), b"")
    try:
        _text_of(_parse(decode(first)), json_key)
    except BadLine:
        return
    raise UsageError(
        f"--input {file}: it begins with a JSON object that has text under {json_key}, and its name "
        f"is not one of JSON lines; accepted are names that end in {', '.join(JSON_LINES_SUFFIXES)}, "
        "or another --json-key, to read it as it stands"
    )


def _good_lines(file: Path, raw: bytes, bad_lines: BadLines) -> Iterator[str]:
    for number, line in enumerate(io.BytesIO(raw), start=1):
        try:
            yield decode(line)
        except BadLine as bad:
            bad_lines.found(f"--input {file}:{number}", *bad.args)


def _read_json_lines(file: Path, json_key: str, bad_lines: BadLines) -> Iterator[Document]:
    with _open(file) as stream:
        for number, raw in enumerate(stream, start=1):
            if number == 1:
                raw = raw.removeprefix(BYTE_ORDER_MARK)
            if not raw.strip():
                continue
            origin = f"{file}:{number}"
            try:
                record = _parse(decode(raw))
            except BadLine as bad:
                bad_lines.found(f"--input {origin}", *bad.args)
                continue
            try:
                yield Document(origin, _text_of(record, json_key))
            except BadLine as bad:
                bad_lines.found(f"--json-key {json_key}: {origin}", *bad.args)


def decode(raw: bytes) -> str:
    """Bytes as text.

    Raises:
        BadLine: with the reason and what is accepted, if they are no UTF-8 text.
    """
    accepted = "UTF-8 text"
    if (place := raw.find(b"\0")) >= 0:
        raise BadLine(f"byte {place} is NUL, as in UTF-16 and in what is no text", accepted)
    try:
        return raw.decode("utf-8")
    except UnicodeDecodeError as error:
        raise BadLine(f"byte {error.start} is not UTF-8", accepted) from error


def _parse(line: str) -> dict:
    accepted = "one JSON object a line"
    try:
        # As floats, since Python reads integers of up to 4300 digits only; none is used.
        record = json.loads(line, parse_int=float)
    except json.JSONDecodeError as error:
        raise BadLine(f"not a JSON object ({error.msg})", accepted) from error
    except RecursionError as error:
        raise BadLine("nested too deeply to be read", accepted) from error
    if not isinstance(record, dict):
        raise BadLine(f"not a JSON object but {_kind(record)}", accepted)
    return record


def _text_of(record: dict, json_key: str) -> str:
    accepted = "a key that holds text"
    if json_key not in record:
        keys = [_printable(key) for key in record]
        shown = ", ".join(keys[:_SHOWN_KEYS]) + ", ..." * (len(keys) > _SHOWN_KEYS)
        raise BadLine(f"holds no such key (it has: {shown or 'none'})", accepted)
    text = record[json_key]
    if not isinstance(text, str):
        raise BadLine(f"holds no text under it but {_kind(text)}", accepted)
    try:
        text.encode("utf-8")
    except UnicodeEncodeError as error:
        half = f"\\u{ord(text[error.start]):04x}"
        raise BadLine(
            f"character {error.start} of the text is {half}, one half of a surrogate pair, "
            "which is no character",
            "text that UTF-8 can hold",
        ) from error
    return text


def _kind(value) -> str:
    names = {dict: "an object", list: "a list", str: "a string", bool: "true or false"}
    return names.get(type(value), "null" if value is None else "a number")


def _printable(text: str) -> str:
    """In one line, and without what no terminal takes (halves of surrogate pairs)."""
    return " ".join(text.encode("utf-8", "backslashreplace").decode().split())
