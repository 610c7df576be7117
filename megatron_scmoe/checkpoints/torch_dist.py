"""Megatron's distributed checkpoints (torch_dist), read in one process.

PyTorch's reader does the work, without a process group; torch_dist_writer.py writes them. Nothing
of a checkpoint is executed: its two pickles, ``.metadata`` and the object with the arguments, may
name the types listed in dcp_metadata.py and in Megatron's ``safe_globals`` and no others.
"""

import argparse
import contextlib
import io
import os
import pickle
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from megatron.core.dist_checkpointing import ShardedObject
from megatron.core.dist_checkpointing.core import CheckpointingConfig, maybe_load_config
from megatron.core.safe_globals import SAFE_GLOBALS
from torch.distributed.checkpoint.default_planner import DefaultLoadPlanner
from torch.distributed.checkpoint.filesystem import FileSystemReader
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    Metadata,
    MetadataIndex,
    TensorStorageMetadata,
)
from torch.distributed.checkpoint.planner import LoadPlan
from torch.distributed.checkpoint.planner_helpers import create_read_items_for_chunk_list

from megatron_scmoe.checkpoints.dcp_metadata import find_flaw_of_files, read_metadata
from megatron_scmoe.checkpoints.identify import what_is
from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor
from megatron_scmoe.checkpoints.model_arguments import with_defaults
from megatron_scmoe.checkpoints.output_folder import TRACKER
from megatron_scmoe.errors import NOT_JSON, ConversionError, in_words

BACKEND = CheckpointingConfig("torch_dist", 1)

LAYOUT = (
    "tensor_model_parallel_size",
    "pipeline_model_parallel_size",
    "expert_model_parallel_size",
    "expert_tensor_parallel_size",
    "context_parallel_size",
    "data_parallel_size",
    "world_size",
)
"""Megatron's arguments that say on which layout of ranks a checkpoint was saved."""


@dataclass(frozen=True)
class MegatronCheckpoint:
    """A checkpoint whose tensors are read when needed.

    ``tensors`` holds the model's weights, by the one name this package uses whatever implementation
    and layout saved them: one key a layer (``decoder.layers.3.…``), the experts of a layer stacked
    along a first dimension (``….mlp.experts.experts.linear_fc1.weight``, [experts, out, in]), the
    norm before a MoE as ``pre_mlp_layernorm``. Optimizer and random states are left out.
    """

    path: Path
    iteration: int
    args: argparse.Namespace | None
    tensors: dict[str, LazyTensor]

    @property
    def layout(self) -> dict[str, int]:
        """The sizes in :data:`LAYOUT` at which it was saved."""
        return {name: getattr(self.args, name) for name in LAYOUT if hasattr(self.args, name)}


def read_megatron(path: str | os.PathLike) -> MegatronCheckpoint:
    """Open a checkpoint, whatever layout of ranks saved it.

    Args:
        path: what ``--save`` named (the last complete iteration is read), or an ``iter_...`` folder.

    Raises:
        ConversionError: if there is none, a file is missing or truncated, or it names a type that
            a checkpoint does not need.
    """
    folder = find_iteration(path)
    try:
        config = maybe_load_config(str(folder)) if folder.is_dir() else None
    except (*NOT_JSON, TypeError, AttributeError) as error:  # or other fields
        raise ConversionError(f"{folder}: its metadata.json is damaged ({_line(error)})") from error
    if config is None or config.sharded_backend != BACKEND.sharded_backend:
        raise ConversionError(
            f"{folder}: no torch_dist checkpoint, but {what_is(folder)}; accepted: a folder with "
            f"{TRACKER}, or an iter_ folder"
        )
    reader = _Reader(folder)
    metadata = reader.read_metadata()
    reader.set_up_storage_reader(metadata, is_coordinator=True)
    common = _read_common(folder, reader, metadata)
    if (common.get("content_metadata") or {}).get("singleton_local_shards"):
        raise ConversionError(f"{folder}: saved with singleton_local_shards, which is not read")
    stored = {
        key: reader.tensor(key, entry)
        for key, entry in metadata.state_dict_metadata.items()
        if isinstance(entry, TensorStorageMetadata) and not _OTHER_STATE.match(key)
    }
    saved = common.get("args")
    if not stored:
        raise ConversionError(
            f"{folder}: it holds no weights of a model"
            + (", but an optimizer's state" if metadata.state_dict_metadata else "")
        )
    return MegatronCheckpoint(
        path=folder,
        iteration=int(common.get("iteration", 0)),
        args=None if saved is None else with_defaults(saved),
        tensors=_normal_form(stored),
    )


def find_iteration(path: str | os.PathLike) -> Path:
    """The folder of the last complete iteration in what ``--save`` named, or ``path`` as it is.

    Raises:
        ConversionError: if the file that says which is the last one does not, or that is missing.
    """
    path = Path(path).expanduser()
    tracker = path / TRACKER
    if tracker.is_file():
        word = tracker.read_text(errors="replace").strip()
        if word != "release" and not (word.isdecimal() and len(word) < 20):
            raise ConversionError(f"{tracker}: {word[:40]!r} is neither an iteration nor 'release'")
        name = word if word == "release" else f"iter_{int(word):07d}"
        if not (path / name).is_dir():
            there = sorted(p.name for p in (*path.glob("iter_*"), *path.glob("release")))
            raise ConversionError(
                f"{path}: {name} is missing, which {TRACKER} names; there is "
                + (f"{', '.join(there)}: give the folder of one" if there else "no other")
            )
        path = path / name
    return path


def read_common(folder: Path) -> dict[str, Any]:
    """What an ``iter_...`` folder holds that is no tensor: arguments, iteration and more.

    Raises:
        ConversionError: as :func:`read_megatron`.
    """
    reader = _Reader(folder)
    return _read_common(folder, reader, reader.read_metadata())


def object_key(name: str, shape: tuple = (1,), offset: tuple = (0,)) -> str:
    """The key under which Megatron stores an object, of a list of them the entry at ``offset``."""
    return ShardedObject(name, None, shape, offset).unique_key


@contextlib.contextmanager
def only_safe_types() -> Iterator[None]:
    """``torch.load`` gives tensors and Megatron's safe types, and refuses the rest, whoever calls it.

    PyTorch's planners for distributed checkpoints load objects without that restriction.
    """
    forced = {"TORCH_FORCE_WEIGHTS_ONLY_LOAD": "1", "TORCH_FORCE_NO_WEIGHTS_ONLY_LOAD": "0"}
    before = {name: os.environ.get(name) for name in forced}
    os.environ.update(forced)
    # The context forgets at its end what it is given, even if Megatron had registered it before.
    known = torch.serialization.get_safe_globals()
    try:
        with torch.serialization.safe_globals([kind for kind in SAFE_GLOBALS if kind not in known]):
            yield
    finally:
        for name, value in before.items():
            del os.environ[name]
            if value is not None:
                os.environ[name] = value


_OTHER_STATE = re.compile(r"(chained_\d+\.)?optimizer\.|rng_state|rerun_state_machine")


class _Reader(FileSystemReader):
    """PyTorch's reader, with restricted pickles and reading parts of tensors on request."""

    def read_metadata(self, *args, **kwargs) -> Metadata:
        file = Path(self.path) / ".metadata"
        try:
            metadata = read_metadata(Path(self.path))
        except FileNotFoundError as error:
            raise ConversionError(f"{file} is missing") from error
        except Exception as error:  # what a damaged pickle raises is anyone's guess
            raise ConversionError(f"{file} is unreadable ({_line(error)})") from error
        flaw = find_flaw_of_files(Path(self.path), metadata)
        if flaw is not None:
            raise ConversionError(flaw)
        return metadata

    def tensor(self, key: str, entry: TensorStorageMetadata) -> LazyTensor:
        dtype = entry.properties.dtype

        def read(box):
            offsets = torch.Size(part.start for part in box)
            sizes = torch.Size(part.stop - part.start for part in box)
            planner = _LoadPlanner(torch.empty(sizes, dtype=dtype))
            items = create_read_items_for_chunk_list(
                key, entry, [ChunkStorageMetadata(offsets, sizes)]
            )
            try:
                self.read_data(LoadPlan(items), planner)
            except Exception as error:  # zip, pickle and file errors: the message is what matters
                raise ConversionError(f"{self.path}: tensor {key}: {_line(error)}") from error
            if planner.missing:
                raise ConversionError(f"{self.path}: tensor {key}: parts of it are missing")
            return planner.target

        return LazyTensor(entry.size, dtype, read)

    def object(self, key: str, metadata: Metadata):
        """An object, as ``torch.load`` with Megatron's list of safe types gives it."""
        info = metadata.storage_data[MetadataIndex(key)]
        file = Path(self.path) / info.relative_path
        with file.open("rb") as stream:
            stream.seek(info.offset)
            return _load_safely(io.BytesIO(stream.read(info.length)), file)


class _LoadPlanner(DefaultLoadPlanner):
    """Puts what is read for one tensor where it belongs."""

    def __init__(self, target: torch.Tensor):
        super().__init__()
        self.target = target
        self.missing = target.numel()

    def resolve_tensor(self, read_item):
        part = self.target
        for dim, (start, size) in enumerate(zip(read_item.dest_offsets, read_item.lengths)):
            part = part.narrow(dim, start, size)
        return part

    def commit_tensor(self, read_item, tensor):
        self.missing -= tensor.numel()


def _load_safely(stream, file: Path):
    try:
        with only_safe_types():
            return torch.load(stream, map_location="cpu", weights_only=True)
    except (pickle.UnpicklingError, RuntimeError, EOFError) as error:
        raise ConversionError(f"{file} is unreadable ({_line(error)})") from error


def _read_common(folder: Path, reader: _Reader, metadata: Metadata) -> dict:
    """What is no tensor: the arguments, the iteration and more. Empty if it was not saved."""
    file = folder / "common.pt"  # older checkpoints
    key = object_key("common_state")
    if file.exists():
        with file.open("rb") as stream:
            common = _load_safely(stream, file)
    elif key in metadata.state_dict_metadata:
        (common,) = reader.object(key, metadata)
    else:
        common = {}
    if not isinstance(common, dict):
        raise ConversionError(f"{folder}: its common state is no dictionary")
    return common


def _normal_form(stored: dict[str, LazyTensor]) -> dict[str, LazyTensor]:
    """One key a layer, and the keys of Transformer Engine (see :class:`MegatronCheckpoint`)."""
    tensors = {}
    for key, tensor in stored.items():
        match = re.fullmatch(r"((?:decoder|encoder)\.layers)\.(?!\d+\.)(.+)", key)
        if match:  # equal layers are saved as one stack
            for i in range(tensor.shape[0]):
                tensors[f"{match[1]}.{i}.{match[2]}"] = tensor.index(i)
        else:
            tensors[key] = tensor
    for key in list(tensors):  # Megatron's local implementation of a MoE; see spec.py
        layer, found, kind = key.partition(".mlp.linear_fc1.layer_norm_")
        if found and f"{layer}.mlp.router.weight" in tensors:
            tensors[f"{layer}.pre_mlp_layernorm.{kind}"] = tensors.pop(key)
    return tensors


def _line(error: BaseException) -> str:
    return in_words(error)[:200]
