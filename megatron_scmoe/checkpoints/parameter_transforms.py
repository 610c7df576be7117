"""The ways in which a tensor of Megatron is made of tensors of Hugging Face's formats.

Tensors stay lazy: a part of the result is read alone, but for :data:`QKV` on the way out.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch

from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor, concatenate, stack

Sizes = Mapping[str, int]
"""Sizes of a model by the names that tables use; a bool says whether the model has something."""


@dataclass(frozen=True)
class Transform:
    """One tensor of Megatron from tensors of Hugging Face, and back.

    Args:
        join: gives Megatron's tensor from Hugging Face's, in the order of the row.
        split: gives Hugging Face's from Megatron's; it is told how many there are.
    """

    join: Callable[[list[LazyTensor], Sizes], LazyTensor]
    split: Callable[[LazyTensor, int, Sizes], list[LazyTensor]]


def _transpose(tensor: LazyTensor) -> LazyTensor:
    return tensor.transpose() if len(tensor.shape) == 2 else tensor


def _join_qkv(parts: list[LazyTensor], sizes: Sizes) -> LazyTensor:
    grouped = zip(*(part.chunk(sizes["groups"]) for part in parts))
    return concatenate([part for group in grouped for part in group])


def _split_qkv(whole: LazyTensor, count: int, sizes: Sizes) -> list[LazyTensor]:
    """Each part reads the whole: a Megatron checkpoint has no cheap way to read some rows."""
    groups, size, rest = sizes["groups"], sizes["head"], whole.shape[1:]
    queries = whole.shape[0] // (groups * size) - 2

    def part(start: int, heads: int) -> LazyTensor:
        def rows(values: torch.Tensor) -> torch.Tensor:
            grouped = values.reshape(groups, queries + 2, size, *rest)
            return grouped[:, start : start + heads].reshape(-1, *rest)

        return whole.apply(rows, (groups * heads * size, *rest))

    return [part(0, queries), part(queries, 1), part(queries + 1, 1)]


def _join_fused_qkv(parts: list[LazyTensor], sizes: Sizes) -> LazyTensor:
    return _join_qkv(_transpose(parts[0]).chunk(3), sizes)


def _split_fused_qkv(whole: LazyTensor, count: int, sizes: Sizes) -> list[LazyTensor]:
    return [_transpose(concatenate(_split_qkv(whole, 3, sizes)))]


def _join_experts(parts: list[LazyTensor], sizes: Sizes) -> LazyTensor:
    inner = len(parts) // sizes["experts"]
    groups = [parts[i : i + inner] for i in range(0, len(parts), inner)]
    return stack([concatenate(group) if inner > 1 else group[0] for group in groups])


def _split_experts(whole: LazyTensor, count: int, sizes: Sizes) -> list[LazyTensor]:
    experts = sizes["experts"]
    return [part for i in range(experts) for part in whole.index(i).chunk(count // experts)]


SAME = Transform(lambda parts, sizes: parts[0], lambda whole, count, sizes: [whole])

FP32 = Transform(lambda parts, sizes: parts[0].cast(torch.float32), SAME.split)
"""The same, in fp32 in Megatron whatever the files have."""

TRANSPOSED = Transform(
    lambda parts, sizes: _transpose(parts[0]), lambda whole, count, sizes: [_transpose(whole)]
)
"""[in, out] in the folder, as transformers' Conv1D has it, [out, in] in Megatron; a bias as it is."""

GATE_UP = Transform(
    lambda parts, sizes: concatenate(parts), lambda whole, count, sizes: whole.chunk(count)
)
"""Gate above up: [ffn, in] and [ffn, in] are [2 ffn, in]."""

QKV = Transform(_join_qkv, _split_qkv)
"""Rows of queries, keys and values by query group: its queries, its key, its value."""

FUSED_QKV_TRANSPOSED = Transform(_join_fused_qkv, _split_fused_qkv)
"""The same from one tensor of all queries, all keys, all values, stored as for TRANSPOSED."""

EXPERTS = Transform(_join_experts, _split_experts)
"""Of every expert one tensor, or gate and up: a stack [experts, out, in]."""
