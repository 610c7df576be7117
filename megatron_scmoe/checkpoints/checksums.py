"""Whether the bytes of a distributed checkpoint are those that were saved.

Each tensor and object in a ``.distcp`` file is an archive with a CRC-32 of its contents, which
``torch.save`` writes and ``torch.load`` does not look at: a flipped bit becomes another weight. Here
the sums are computed anew. Nothing is unpickled, and memory holds a few megabytes.
"""

import io
import itertools
import zipfile
import zlib
from collections.abc import Iterator
from pathlib import Path
from typing import NamedTuple

from torch.distributed.checkpoint.metadata import Metadata

from megatron_scmoe.checkpoints.dcp_metadata import read_metadata


class _Piece(NamedTuple):
    """Bytes of a file that belong to one tensor or object."""

    file: str
    offset: int
    length: int
    name: str


def find_damage(folder: Path, part: int = 0, parts: int = 1) -> str | None:
    """The first tensor or object whose bytes are not those that were saved; None if there is none.

    Args:
        folder: of one iteration, whose files have the sizes that ``.metadata`` says
            (:func:`~megatron_scmoe.checkpoints.dcp_metadata.find_flaw_of_files`).
        part: which of ``parts`` equal shares of the bytes is read. Every rank takes its own.

    Returns:
        The file, what of it is damaged, and how that shows.
    """
    for piece in _share(_pieces(read_metadata(folder)), part, parts):
        flaw = _flaw(folder / piece.file, piece)
        if flaw is not None:
            return f"{folder / piece.file} is damaged: {piece.name} {flaw}"
    return None


def _pieces(metadata: Metadata) -> list[_Piece]:
    places = metadata.storage_data.items()
    return sorted(
        _Piece(place.relative_path, place.offset, place.length, index.fqn)
        for index, place in places
        if not getattr(place, "transform_descriptors", None)  # compressed: no archive of its own
    )


def _share(pieces: list[_Piece], part: int, parts: int) -> Iterator[_Piece]:
    """The pieces that begin in this share of all bytes."""
    total = sum(piece.length for piece in pieces)
    starts = itertools.accumulate((piece.length for piece in pieces), initial=0)
    for piece, start in zip(pieces, starts):
        if total * part <= start * parts < total * (part + 1):
            yield piece


def _flaw(file: Path, piece: _Piece) -> str | None:
    try:
        with open(file, "rb") as stream, zipfile.ZipFile(_Window(stream, piece)) as archive:
            bad = archive.testzip()
    except (zipfile.BadZipFile, zlib.error, NotImplementedError, RuntimeError, ValueError):
        return "is no archive any more"
    except OSError as error:
        return f"cannot be read ({error.strerror or error})"
    return None if bad is None else "has another checksum than it was saved with"


class _Window(io.RawIOBase):
    """A part of an open file, as a file."""

    def __init__(self, stream: io.BufferedReader, piece: _Piece):
        self._stream, self._start, self._length = stream, piece.offset, piece.length
        self._position = 0

    def seekable(self) -> bool:
        return True

    def readable(self) -> bool:
        return True

    def tell(self) -> int:
        return self._position

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        base = {io.SEEK_SET: 0, io.SEEK_CUR: self._position, io.SEEK_END: self._length}[whence]
        if base + offset < 0:
            raise ValueError("before the beginning")
        self._position = base + offset
        return self._position

    def readinto(self, buffer) -> int:
        size = max(0, min(len(buffer), self._length - self._position))
        self._stream.seek(self._start + self._position)
        read = self._stream.readinto(memoryview(buffer)[:size])
        self._position += read
        return read
