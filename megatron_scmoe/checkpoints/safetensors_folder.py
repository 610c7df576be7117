"""Folders with safetensors files, as Hugging Face's libraries read and write them."""

import json
import os
from pathlib import Path
from typing import Any

import torch
from huggingface_hub import split_state_dict_into_shards_factory
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file
from tqdm import tqdm

from megatron_scmoe.checkpoints.identify import what_is
from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor, total_bytes
from megatron_scmoe.errors import NOT_JSON, ConversionError

INDEX = "model.safetensors.index.json"
SINGLE = "model.safetensors"

_PATTERN = "model{suffix}.safetensors"
_DTYPES = {
    "F64": torch.float64,
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
    "F8_E4M3": torch.float8_e4m3fn,
    "F8_E5M2": torch.float8_e5m2,
    "I64": torch.int64,
    "I32": torch.int32,
    "I16": torch.int16,
    "I8": torch.int8,
    "U8": torch.uint8,
    "BOOL": torch.bool,
}


def read_config(folder: Path) -> dict[str, Any]:
    """``config.json`` of a model folder.

    Raises:
        ConversionError: if it is missing or no JSON object.
    """
    config = _read_json(folder / "config.json")
    if not isinstance(config, dict):
        raise ConversionError(f"{folder / 'config.json'}: not a JSON object")
    return config


def read_generation_config(folder: Path) -> dict[str, Any]:
    """``generation_config.json`` of a model folder; empty if there is none.

    Raises:
        ConversionError: if it is no JSON object.
    """
    file = folder / "generation_config.json"
    config = _read_json(file) if file.exists() else {}
    if not isinstance(config, dict):
        raise ConversionError(f"{file}: not a JSON object")
    return config


def read_safetensors(folder: str | os.PathLike) -> dict[str, LazyTensor]:
    """The tensors of a model folder by name; values are read from the files when loaded.

    Raises:
        ConversionError: if a file is missing, truncated or does not hold what the index says.
    """
    folder = Path(folder)
    where = _read_index(folder)
    files = _Files(folder)
    tensors = {}
    for name in sorted(set(where.values())):
        held = set(files.open(name).keys())
        for key in sorted(held & where.keys()):
            if where[key] != name:
                raise ConversionError(
                    f"{folder / name}: tensor {key} is in it, and {INDEX} says that it is in "
                    f"{where[key]}"
                )
        expected = {key for key, file in where.items() if file == name}
        for key in sorted(expected - held):
            raise ConversionError(f"{folder / name}: no tensor {key}, which {INDEX} says is there")
        for key in sorted(held - expected):
            raise ConversionError(f"{folder / name}: tensor {key} is not in {INDEX}")
        tensors.update({key: files.tensor(name, key) for key in sorted(expected)})
    return {key: tensors[key] for key in where}


def write_safetensors(
    folder: str | os.PathLike, tensors: dict[str, LazyTensor], max_shard_size: str | int = "5GB"
) -> None:
    """Write one shard after the other, and the index if there is more than one.

    Args:
        folder: an existing folder.
        tensors: by name.
        max_shard_size: in bytes, or a number with a unit ("5GB"); also the bound of the memory used,
            unless a single tensor is larger.

    Raises:
        ConversionError: if the size cannot be read, or a tensor cannot be loaded.
    """
    folder = Path(folder)
    try:
        split = split_state_dict_into_shards_factory(
            tensors,
            get_storage_size=lambda tensor: tensor.nbytes,
            get_storage_id=lambda tensor: None,
            filename_pattern=_PATTERN,
            max_shard_size=max_shard_size,
        )
    except ValueError as error:
        raise ConversionError(
            f"--max-shard-size {max_shard_size}: accepted: a number of bytes, or one with a unit (5GB)"
        ) from error
    with tqdm(total=total_bytes(tensors), unit="B", unit_scale=True, disable=None) as bar:
        for name, keys in split.filename_to_tensors.items():
            shard = {}
            for key in keys:
                bar.set_postfix_str(key, refresh=False)
                shard[key] = tensors[key].load()
                bar.update(tensors[key].nbytes)
            file = folder / name
            file.touch()
            mode = file.stat().st_mode
            save_file(shard, file, metadata={"format": "pt"})
            file.chmod(mode)  # as the user's umask has it; safetensors makes files private
    if split.is_sharded:
        index = {"metadata": split.metadata, "weight_map": split.tensor_to_filename}
        (folder / INDEX).write_text(json.dumps(index, indent=2, sort_keys=True) + "\n")


def _read_json(file: Path) -> Any:
    try:
        return json.loads(file.read_text(encoding="utf-8"))
    except OSError as error:
        raise ConversionError(f"{file}: {error.strerror}") from error
    except NOT_JSON as error:
        raise ConversionError(f"{file}: not JSON ({error})") from error


def _read_index(folder: Path) -> dict[str, str]:
    """File name by tensor name."""
    index, single = folder / INDEX, folder / SINGLE
    if not index.exists():
        if not single.exists():
            raise ConversionError(
                f"{folder}: neither {INDEX} nor {SINGLE}; it is {what_is(folder)}"
            )
        return dict.fromkeys(_open(single).keys(), SINGLE)
    if single.exists():
        raise ConversionError(
            f"{folder}: both {INDEX} and {SINGLE}; accepted: one (transformers reads {SINGLE})"
        )
    content = _read_json(index)
    try:
        where = dict(content["weight_map"])
    except (ValueError, KeyError, TypeError) as error:
        raise ConversionError(f"{index}: not an index of safetensors files") from error
    if not where:
        raise ConversionError(f"{index}: it names no tensors")
    for name in where.values():
        if not isinstance(name, str) or Path(name).name != name:
            raise ConversionError(f"{index}: {name} is not a file of this folder")
    return where


class _Files:
    """The files of a folder, one open at a time: an open one keeps what was read of it in memory."""

    def __init__(self, folder: Path):
        self.folder = folder
        self._open: tuple[str, Any] | None = None

    def open(self, name: str):
        if self._open is None or self._open[0] != name:
            self._open = None
            self._open = (name, _open(self.folder / name))
        return self._open[1]

    def tensor(self, name: str, key: str) -> LazyTensor:
        part = self.open(name).get_slice(key)
        if part.get_dtype() not in _DTYPES:
            raise ConversionError(
                f"{self.folder / name}: tensor {key} has the unknown dtype {part.get_dtype()}"
            )

        def read(box):
            file = self.open(name)
            return file.get_slice(key)[box] if box else file.get_tensor(key)

        return LazyTensor(part.get_shape(), _DTYPES[part.get_dtype()], read)


def _open(file: Path):
    if not file.exists():
        raise ConversionError(f"{file}: no such file (a missing shard)")
    try:
        return safe_open(file, framework="pt")
    except SafetensorError as error:
        raise ConversionError(f"{file}: truncated, or no safetensors file ({error})") from error
    except OSError as error:
        raise ConversionError(f"{file}: {error.strerror or error}") from error
