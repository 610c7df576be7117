"""Megatron's datasets on the disk: whether they are whole, and what is in them.

Whatever the size of the data, a check reads headers, sizes and bounded samples.
"""

import os
import re
import struct
from dataclasses import dataclass

import numpy as np
from megatron.core.datasets.blended_megatron_dataset_config import (
    convert_split_vector_to_split_matrix,
    parse_and_normalize_split,
)
from megatron.core.datasets.indexed_dataset import DType, get_bin_path, get_idx_path
from megatron.core.datasets.utils import Split

from megatron_scmoe.errors import InputError

INDEX_SAMPLE = 1_000_000
"""Sequences whose entries in the index are looked at."""

MEGATRON_SPLIT = "969, 30, 1"
"""What Megatron takes where ``--split`` is not given."""


def parse_split(split: str | None) -> list[float]:
    """The shares of training, validation and test, which sum to 1.

    Args:
        split: as ``--split`` takes it; None if it is not given. Megatron picks the numbers out of any
            text, and so takes 90,x,5 for 90,5 and 1e-1 for 1,1: that is none here.

    Raises:
        InputError: if it cannot be parsed.
    """
    if split is None:
        split = MEGATRON_SPLIT
    words = re.split(r"\s*[,;:/]\s*|\s+", split.strip())
    try:
        if not all(re.fullmatch("[.0-9]+", word) for word in words):
            raise ValueError
        with np.errstate(invalid="ignore"):  # 0,0,0
            shares = parse_and_normalize_split(split)
    except (AssertionError, ValueError):
        shares = []
    if not shares or not np.isfinite(shares).all():
        raise InputError(f"--split {split}", "cannot be parsed", "shares such as 969,30,1")
    return shares


@dataclass(frozen=True)
class IndexedDataset:
    """Megatron's indexed dataset PREFIX.bin and PREFIX.idx.

    Args:
        given: the flag that names it, and its value.
        prefix: of both files.
        is_split: whether ``--split`` divides it.
    """

    given: str
    prefix: str
    is_split: bool

    # Magic, version, code of the data type, number of sequences and of document boundaries. Then
    # follow the length of each sequence (int32), its first byte (int64) and the boundaries (int64).
    _HEADER = struct.Struct("<9sQBQQ")
    _MAGIC = b"MMIDIDX\x00\x00"
    _MADE_BY = "a pair of .bin and .idx files written by scmoe preprocess-data"

    @property
    def bin(self) -> str:
        """The file of the tokens."""
        return get_bin_path(self.prefix)

    @property
    def idx(self) -> str:
        """The file of the sequences' lengths and places."""
        return get_idx_path(self.prefix)

    def check(self) -> tuple[np.dtype, np.ndarray]:
        """Check that index and data are whole.

        Returns:
            The type of a token, and the first byte of each sequence in the .bin file, int64 [n].

        Raises:
            InputError: if they are not.
        """
        for file in (self.idx, self.bin):
            self._require(os.path.isfile(file), f"there is no file {file}")
            self._require(os.access(file, os.R_OK), f"{file} cannot be read")
        with open(self.idx, "rb") as stream:
            header = stream.read(self._HEADER.size)
        whole = len(header) == self._HEADER.size and header.startswith(self._MAGIC)
        self._require(whole, f"{self.idx} does not begin like an index")
        _, version, code, sequences, documents = self._HEADER.unpack(header)
        self._require(version == 1, f"{self.idx} has version {version}, not 1")
        self._require(code in {d.value for d in DType}, f"{self.idx} has the data type {code}")
        self._require(sequences > 0 and documents > 0, f"{self.idx} has no sequence")
        size, expected = os.path.getsize(self.idx), len(header) + 12 * sequences + 8 * documents
        self._require(  # one more byte for each sequence of a multimodal dataset
            size in (expected, expected + sequences),
            f"{self.idx} has {size} bytes, and {expected} by its header",
        )
        dtype = np.dtype(DType.dtype_from_code(code))
        return dtype, self._check_entries(sequences, documents, dtype.itemsize)

    def find_token_outside(self, vocab_size: int, sample: int) -> tuple[int, int] | None:
        """Position and id of a token outside the vocabulary, among ``sample`` tokens; or None."""
        dtype, _ = self.check()
        tokens = np.memmap(self.bin, dtype, mode="r")
        for window in _windows(tokens.size, sample):
            ids = tokens[window]
            if ids.max() >= vocab_size or ids.min() < 0:
                position = int(np.argmax((ids >= vocab_size) | (ids < 0)))
                return window.start + position, int(ids[position])
        return None

    def part_without_token(self, split: str, starts: np.ndarray) -> str | None:
        """The name of a part of ``split`` that gets no token; None if all get some.

        Args:
            split: as ``--split`` takes it.
            starts: the first byte of each sequence, int64 [n].

        Raises:
            InputError: if the split cannot be parsed.
        """
        for part, share in zip(Split, convert_split_vector_to_split_matrix(parse_split(split))):
            if share is None:
                continue
            first, last = (round(edge * starts.size) for edge in share)
            end = starts[last] if last < starts.size else os.path.getsize(self.bin)
            if first == last or starts[first] == end:
                return part.name
        return None

    def _check_entries(self, sequences: int, documents: int, itemsize: int) -> np.ndarray:
        offset = self._HEADER.size
        lengths = np.memmap(self.idx, "<i4", "r", offset, sequences)
        starts = np.memmap(self.idx, "<i8", "r", offset + 4 * sequences, sequences)
        bounds = np.memmap(self.idx, "<i8", "r", offset + 12 * sequences, documents)
        agree = starts[0] == 0 and bounds[-1] == sequences
        for window in _windows(sequences, INDEX_SAMPLE):
            length, start = lengths[window].astype(np.int64), starts[window]
            agree &= (length >= 0).all() and (np.diff(start) == length[:-1] * itemsize).all()
        self._require(agree, f"{self.idx} has entries that do not agree")
        size, expected = os.path.getsize(self.bin), int(starts[-1]) + int(lengths[-1]) * itemsize
        self._require(
            size == expected, f"{self.bin} has {size} bytes, and {expected} by its .idx file"
        )
        self._require(size > 0, f"{self.bin} has no token")
        return starts

    def _require(self, whole: bool, flaw: str) -> None:
        if not whole:
            raise InputError(self.given, flaw, self._MADE_BY)


def _windows(total: int, limit: int) -> list[slice]:
    """At most ``limit`` of ``total`` elements: the beginning, the middle and the end."""
    part = limit // 3
    if total <= 3 * part:
        return [slice(0, total)]
    return [slice(start, start + part) for start in (0, (total - part) // 2, total - part)]
