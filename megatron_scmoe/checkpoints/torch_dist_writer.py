"""Megatron's distributed checkpoints (torch_dist), written in one process.

PyTorch's writer does the work, without a process group. See torch_dist.py for how they are read.
"""

import argparse
import io
from collections.abc import Iterator
from dataclasses import replace
from pathlib import Path

import torch
from megatron.core.dist_checkpointing.core import save_config
from torch.distributed.checkpoint.api import CheckpointException
from torch.distributed.checkpoint.default_planner import DefaultSavePlanner
from torch.distributed.checkpoint.filesystem import FileSystemWriter
from torch.distributed.checkpoint.metadata import (
    ChunkStorageMetadata,
    MetadataIndex,
    StorageMeta,
    TensorProperties,
)
from torch.distributed.checkpoint.planner import (
    SavePlan,
    TensorWriteData,
    WriteItem,
    WriteItemType,
)
from torch.distributed.checkpoint.state_dict_saver import save
from torch.distributed.checkpoint.storage import WriteResult
from torch.futures import Future
from tqdm import tqdm

from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor, total_bytes
from megatron_scmoe.checkpoints.output_folder import TRACKER
from megatron_scmoe.checkpoints.torch_dist import BACKEND, object_key


def write_megatron(
    folder: Path, args: argparse.Namespace, tensors: dict[str, LazyTensor], description: str = ""
) -> None:
    """Write a checkpoint that Megatron loads on every layout with ``--load`` alone.

    It is a release checkpoint: training starts at iteration 0 with a fresh optimizer. Tensors are
    loaded one at a time, those of three and more dimensions one entry of the first at a time.

    Args:
        folder: an existing folder, which ``--load`` will name.
        args: Megatron's arguments of the model (see arguments.py for a way to build them).
        tensors: the weights, named as in :class:`MegatronCheckpoint`.
        description: what the progress bar says.
    """
    release = folder / "release"
    release.mkdir()
    common = {
        "args": args,
        "checkpoint_version": 3.0,
        "iteration": 0,
        "content_metadata": {"singleton_local_shards": False, "non_homogeneous_layers": True},
    }
    objects = {object_key("common_state"): common} | dict.fromkeys(_extra_states(tensors))
    failure: BaseException | None = None
    with tqdm(
        total=total_bytes(tensors), desc=description, unit="B", unit_scale=True, disable=None
    ) as bar:
        try:
            save(
                {**objects, **tensors},
                storage_writer=_Writer(release),
                planner=_SavePlanner(bar),
                no_dist=True,
            )
        except CheckpointException as error:  # it wraps everything, Ctrl-C too
            ((failure, _),) = error.failures.values()
    if failure is not None:
        raise failure  # not above: there it would lose its context, which may be an interrupt
    save_config(BACKEND, str(release))
    (folder / TRACKER).write_text("release")


def _extra_states(tensors: dict[str, LazyTensor]) -> Iterator[str]:
    """Megatron asks for an extra state of each module, empty unless it computes in FP8.

    Which modules have one depends on the implementation; it loads what it asks for.
    """
    modules = {key.rpartition(".")[0] for key in tensors}
    layers = {key.partition(".self_attention.")[0] for key in tensors if ".self_attention." in key}
    for name in sorted(modules | {f"{layer}.self_attention.core_attention" for layer in layers}):
        stacked = ".experts.experts." in name
        count = tensors[f"{name}.weight"].shape[0] if stacked else 1
        for i in range(count):
            yield object_key(f"{name}._extra_state", (count,), (i,))
    for key in tensors:  # a norm of its own under the key of one fused into the linear layer
        if key.endswith(".layer_norm_weight"):
            yield object_key(f"{key.removesuffix('weight')}_extra_state")


class _SavePlanner(DefaultSavePlanner):
    """Plans from shapes alone, and loads a tensor when the writer asks for it."""

    def __init__(self, bar: tqdm):
        super().__init__(flatten_state_dict=False, flatten_sharded_tensors=False)
        self.bar = bar

    def create_local_plan(self) -> SavePlan:
        items: list[WriteItem] = []
        for key, value in self.state_dict.items():
            if isinstance(value, LazyTensor):
                items.extend(_write_items(key, value))
            else:
                items.append(WriteItem(MetadataIndex(key), WriteItemType.BYTE_IO))
        self.plan = SavePlan(items)
        return self.plan

    def resolve_data(self, item: WriteItem):
        value = self.state_dict[item.index.fqn]
        if item.type == WriteItemType.BYTE_IO:
            stream = io.BytesIO()
            torch.save([value], stream)
            return stream
        self.bar.set_postfix_str(item.index.fqn, refresh=False)
        if len(value.shape) > 2:
            assert item.index.offset is not None  # _write_items gives one
            i = item.index.offset[0]
            value = value.narrow(0, i, 1)
        tensor = value.load()
        self.bar.update(tensor.nbytes)
        return tensor


def _write_items(key: str, tensor: LazyTensor) -> Iterator[WriteItem]:
    """One item a tensor; of a stack, one item an entry."""
    parts = tensor.shape[0] if len(tensor.shape) > 2 else 1
    sizes = torch.Size((1, *tensor.shape[1:])) if len(tensor.shape) > 2 else tensor.shape
    for i in range(parts):
        offsets = torch.Size([i, *[0] * (len(sizes) - 1)] if sizes else [])
        yield WriteItem(
            MetadataIndex(key, offsets),
            WriteItemType.SHARD,
            tensor_data=TensorWriteData(
                chunk=ChunkStorageMetadata(offsets, sizes),
                properties=TensorProperties(dtype=tensor.dtype),
                size=tensor.shape,
            ),
        )


class _Writer(FileSystemWriter):
    """PyTorch's writer, which holds the tensors of a file until it is complete, in several files."""

    FILE_BYTES = 2**30

    def __init__(self, path: Path):
        super().__init__(path, per_thread_copy_ahead=0)

    def write_data(self, plan: SavePlan, planner) -> Future[list[WriteResult]]:
        results = []
        for number, items in enumerate(self._files(plan.items)):
            prefix = replace(plan.storage_data, prefix=f"{plan.storage_data.prefix}{number}_")
            part = replace(plan, items=items, storage_data=prefix)
            results.extend(super().write_data(part, planner).wait())
        done: Future[list[WriteResult]] = Future()
        done.set_result(results)
        return done

    def storage_meta(self) -> StorageMeta:
        return StorageMeta(save_id=self.save_id)  # the path is a temporary one

    def _files(self, items: list[WriteItem]) -> Iterator[list[WriteItem]]:
        file: list[WriteItem] = []
        filled = 0
        for item in items:
            data = item.tensor_data
            size = data.chunk.sizes.numel() * data.properties.dtype.itemsize if data else 0
            if file and filled + size > self.FILE_BYTES:
                yield file
                file, filled = [], 0
            file.append(item)
            filled += size
        yield file
