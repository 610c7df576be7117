"""Where experts live that are not on the device: in files mapped to memory, or in pinned memory.

A key is a layer's number, as Megatron counts them from 1, and the number of an expert of this rank.
"""

import fcntl
import hashlib
import json
import math
import mmap
import warnings
import weakref
from abc import ABC, abstractmethod
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import torch
from torch import Tensor
from tqdm import tqdm

from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor
from megatron_scmoe.errors import NOT_JSON, InputError
from megatron_scmoe.platform.atomic_write import atomic_write, lack_of_space
from megatron_scmoe.platform.command_line import is_first_rank

Key = tuple[int, int]

PAGE_BYTES = 4096
"""Each expert begins at a page of its file."""

ALIGNMENT_BYTES = 256
"""Each weight begins at a multiple of it, as those that PyTorch allocates: kernels ask for it."""

MANIFEST = "experts.json"


@dataclass(frozen=True)
class Packing:
    """How the weights of one expert lie in memory, one behind the other.

    Args:
        shapes: of the weights, by name, in their order.
        dtype: of all of them.
    """

    shapes: Mapping[str, tuple[int, ...]]
    dtype: torch.dtype

    @property
    def nbytes(self) -> int:
        """Of one expert, in whole pages."""
        return _up(self._places()[-1][1], PAGE_BYTES)

    def views(self, memory: Tensor) -> dict[str, Tensor]:
        """The weights in ``memory``, uint8 [nbytes], by name."""
        return {
            name: memory[start:stop].view(self.dtype).view(shape)
            for (name, shape), (start, stop) in zip(self.shapes.items(), self._places())
        }

    def fill(self, memory: Tensor, weights: Mapping[str, LazyTensor], expert: int) -> None:
        """Read one expert's weights into ``memory``, uint8 [nbytes].

        Args:
            weights: those of all experts of a layer, by name, [experts, ...].
        """
        for name, weight in self.views(memory).items():
            weight.copy_(weights[name].index(expert).load())

    def _places(self) -> list[tuple[int, int]]:
        """Where each weight begins and ends."""
        places, end = [], 0
        for shape in self.shapes.values():
            start = _up(end, ALIGNMENT_BYTES)
            end = start + math.prod(shape) * self.dtype.itemsize
            places.append((start, end))
        return places


class HostExperts(ABC):
    """Experts in the host's reach."""

    @abstractmethod
    def row(self, key: Key) -> Tensor:
        """An expert as :class:`Packing` lays it out, uint8 [nbytes]; not to be written to."""

    def announce(self, key: Key) -> None:  # noqa: B027  not every kind needs it
        """Say that the expert will be read soon."""


class PinnedExperts(HostExperts):
    """Experts in page-locked memory, which a GPU copies from without the host.

    Args:
        memory: of each layer, uint8 [experts, nbytes]; see :func:`pinned_memory`.
    """

    def __init__(self, memory: Mapping[int, Tensor]):
        self._rows = {
            (layer, expert): row
            for layer, rows in memory.items()
            for expert, row in enumerate(rows.unbind())
        }

    def row(self, key):
        return self._rows[key]


class MappedExperts(HostExperts):
    """Experts in files, read when needed; the pages are the system's to keep or to drop.

    Args:
        files: of each layer, as :func:`write_expert_files` writes them.
        nbytes: of one expert.
        first: which expert of a file is this rank's first.
    """

    def __init__(self, files: Mapping[int, Path], nbytes: int, first: int):
        self._maps = {}
        self._memory = {}
        self._nbytes, self._first = nbytes, first
        for layer, file in files.items():
            with file.open("rb") as stream:
                self._maps[layer] = mmap.mmap(stream.fileno(), 0, access=mmap.ACCESS_READ)
            with warnings.catch_warnings():
                warnings.simplefilter("ignore")  # that it cannot be written to
                memory = torch.frombuffer(self._maps[layer], dtype=torch.uint8)
            self._memory[layer] = memory.view(-1, nbytes)

    def row(self, key):
        layer, expert = key
        return self._memory[layer][self._first + expert]

    def announce(self, key):
        layer, expert = key
        start = (self._first + expert) * self._nbytes
        self._maps[layer].madvise(mmap.MADV_WILLNEED, start, self._nbytes)


def pinned_memory(experts: int, nbytes: int) -> Tensor:
    """Page-locked memory for a layer's experts, uint8 [experts, nbytes], of exactly that size.

    PyTorch's own allocator of pinned memory takes the next power of two.

    Raises:
        InputError: if the host has not that much.
    """
    memory = torch.empty(experts, nbytes, dtype=torch.uint8)
    cudart = torch.cuda.cudart()
    address = memory.data_ptr()
    if int(cudart.cudaHostRegister(address, memory.nbytes, 0)) != 0:
        raise InputError(
            "--offload-experts",
            f"the host does not pin {memory.nbytes / 1e9:.2f} GB more for a layer's experts",
            "a host with more memory",
        )
    weakref.finalize(memory, cudart.cudaHostUnregister, address).atexit = False
    return memory


def write_expert_files(
    folder: Path,
    checkpoint: Path,
    packing: Packing,
    layers: Mapping[int, Mapping[str, LazyTensor]],
) -> dict[int, Path]:
    """A file with all experts of each layer; what is there of the same checkpoint is kept.

    One expert is in memory at a time, and a file appears whole or not at all. Ranks of one host, or
    of several with a common folder, take turns.

    Args:
        folder: is made if need be.
        checkpoint: where the weights come from.
        layers: of each layer's number the weights by name, [experts, ...].

    Raises:
        InputError: if the folder holds experts of something else, or cannot be written to.
    """
    given = f"--expert-folder {folder}"
    manifest = {
        "checkpoint": fingerprint(checkpoint),
        "dtype": str(packing.dtype).removeprefix("torch."),
        "shapes": {name: list(shape) for name, shape in packing.shapes.items()},
    }
    files = {layer: folder / f"layer_{layer:04d}.experts" for layer in layers}
    sizes = {layer: _count(layers[layer]) * packing.nbytes for layer in layers}
    try:
        folder.mkdir(parents=True, exist_ok=True)
        if not all(file.exists() for file in (folder / MANIFEST, *files.values())):
            with _locked(folder):
                _begin(given, folder, manifest)
                missing = [layer for layer, file in files.items() if not file.exists()]
                lack = lack_of_space(folder, sum(sizes[layer] for layer in missing))
                if lack is not None:
                    raise InputError(given, lack, "a folder on a disk with more space")
                _write(packing, [(files[layer], layers[layer]) for layer in missing])
        _compare(given, folder, manifest)
    except OSError as error:
        raise InputError(
            given, f"cannot write there ({error.strerror})", "a folder that can be written to"
        ) from error
    for layer, file in files.items():
        if (found := file.stat().st_size) != sizes[layer]:
            raise InputError(
                given,
                f"{file.name} has {found} bytes instead of {sizes[layer]}",
                "a folder that nothing else writes to, or an empty one",
            )
    return files


def fingerprint(checkpoint: Path) -> str:
    """What another checkpoint, or the same saved again, does not have."""
    digest = hashlib.sha256((checkpoint / ".metadata").read_bytes())
    for file in sorted(checkpoint.glob("*.distcp")):
        found = file.stat()
        digest.update(f"{file.name} {found.st_size} {found.st_mtime_ns}".encode())
    return digest.hexdigest()


def _write(packing: Packing, layers: list[tuple[Path, Mapping[str, LazyTensor]]]) -> None:
    memory = torch.zeros(packing.nbytes, dtype=torch.uint8)
    is_shown = None if is_first_rank() else True
    total = sum(_count(weights) for _, weights in layers)
    with tqdm(total=total, desc="experts to files", disable=is_shown) as bar:
        for file, weights in layers:
            with atomic_write(file) as (part,), part.open("wb") as stream:
                for expert in range(_count(weights)):
                    packing.fill(memory, weights, expert)
                    stream.write(memory.numpy())
                    bar.update()


def _begin(given: str, folder: Path, manifest: dict) -> None:
    """Say in a new folder what it will hold; what is in an old one must be that."""
    if (folder / MANIFEST).exists():
        _compare(given, folder, manifest)
        return
    if others := sorted(file.name for file in folder.iterdir() if file.name != _LOCK):
        raise InputError(given, f"{others[0]} is in it", "a new or an empty folder")
    with atomic_write(folder / MANIFEST) as (part,):
        part.write_text(json.dumps(manifest, indent=1) + "\n")


def _compare(given: str, folder: Path, expected: dict) -> None:
    """Refuse a folder with experts of something else."""
    try:
        found = json.loads((folder / MANIFEST).read_text())
    except NOT_JSON:
        found = None
    found = found if isinstance(found, dict) else {}
    for name, words in (
        ("checkpoint", "experts of another checkpoint"),
        ("dtype", f"experts in {found.get('dtype')}"),
        ("shapes", "experts of other shapes"),
    ):
        if found.get(name) != expected[name]:
            raise InputError(given, f"it holds {words}", "another folder, new or empty")


_LOCK = ".lock"


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    with (folder / _LOCK).open("w") as stream:
        fcntl.flock(stream, fcntl.LOCK_EX)
        yield


def _count(weights: Mapping[str, LazyTensor]) -> int:
    return next(iter(weights.values())).shape[0]


def _up(size: int, multiple: int) -> int:
    return -(-size // multiple) * multiple
