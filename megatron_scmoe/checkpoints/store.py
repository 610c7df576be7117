"""All that a format needs to read and write checkpoints tensor by tensor."""

from megatron_scmoe.checkpoints.folder import new_folder
from megatron_scmoe.checkpoints.lazy import (
    ConversionError,
    LazyTensor,
    check_tensors,
    check_weights,
    concatenate,
    naming,
    stack,
    total_bytes,
)
from megatron_scmoe.checkpoints.safetensors_folder import read_safetensors, write_safetensors
from megatron_scmoe.checkpoints.torch_dist import (
    MegatronCheckpoint,
    read_megatron,
    write_megatron,
)

__all__ = [
    "ConversionError",
    "LazyTensor",
    "MegatronCheckpoint",
    "check_tensors",
    "check_weights",
    "concatenate",
    "naming",
    "new_folder",
    "read_megatron",
    "read_safetensors",
    "stack",
    "total_bytes",
    "write_megatron",
    "write_safetensors",
]
