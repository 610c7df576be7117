"""What ``.metadata`` of a distributed checkpoint says, without executing anything of it."""

import pickle
from collections.abc import Mapping, Set
from pathlib import Path
from typing import ClassVar

import torch
from torch.distributed.checkpoint.metadata import Metadata


def read_metadata(folder: Path) -> Metadata:
    """The metadata of a checkpoint's folder.

    Raises:
        FileNotFoundError: if there is none.
        pickle.UnpicklingError: if it names a type that metadata does not need.
        Exception: whatever a damaged pickle raises.
    """
    with open(folder / ".metadata", "rb") as stream:
        metadata = _MetadataUnpickler(stream).load()
    if not isinstance(metadata, Metadata):
        raise pickle.UnpicklingError("it holds something else")
    return metadata


def find_flaw_of_files(folder: Path, metadata: Metadata) -> str | None:
    """Which file of a checkpoint is missing or shorter than its metadata says; None if none is."""
    ends: dict[str, int] = {}
    for place in metadata.storage_data.values():
        if Path(place.relative_path).name != place.relative_path:
            return f"{place.relative_path} is not a file of {folder}"
        end = place.offset + place.length
        ends[place.relative_path] = max(end, ends.get(place.relative_path, 0))
    for name, end in sorted(ends.items()):
        file = folder / name
        if not file.is_file():
            return f"{file} is missing"
        if file.stat().st_size < end:
            return f"{file} is truncated ({file.stat().st_size} of {end} bytes)"
    return None


class _MetadataUnpickler(pickle.Unpickler):
    """Knows the types that metadata consists of, and refuses all others."""

    _KNOWN: ClassVar[Mapping[str, Set[str]]] = {
        "torch": {"Size"} | {n for n in dir(torch) if isinstance(getattr(torch, n), torch.dtype)},
        "torch.serialization": {"_get_layout"},
        "torch.distributed.checkpoint.filesystem": {"_StorageInfo"},
        "torch.distributed.checkpoint.metadata": {
            "BytesStorageMetadata",
            "ChunkStorageMetadata",
            "Metadata",
            "MetadataIndex",
            "StorageMeta",
            "TensorProperties",
            "TensorStorageMetadata",
            "_MEM_FORMAT_ENCODING",
        },
        "megatron.core.dist_checkpointing.strategies.torch": {"MCoreMetadata"},
        "pathlib": {"Path", "PosixPath"},
    }

    def find_class(self, module: str, name: str):
        if name not in self._KNOWN.get(module, ()):
            raise pickle.UnpicklingError(f"it asks for {module}.{name}")
        return super().find_class(module, name)
