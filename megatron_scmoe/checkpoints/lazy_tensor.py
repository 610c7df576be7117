"""Tensors that are read when needed: the currency in which formats are converted.

A mapping between formats is a function from ``dict[str, LazyTensor]`` to ``dict[str, LazyTensor]``.
It computes shapes and dtypes only; a writer then loads one tensor after the other.
"""

import contextlib
import itertools
import math
import os
from collections.abc import Callable, Iterator, Mapping, Sequence

import torch
from torch import Tensor

from megatron_scmoe.errors import ConversionError

Box = tuple[slice, ...]
"""A part of a tensor: a slice with start and stop for each dimension."""


WEIGHT_DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


class LazyTensor:
    """A tensor whose shape and dtype are known and whose values are read by :meth:`load`.

    The operations below are lazy too. All but :meth:`apply` and :meth:`reshape` hand a request for
    a part down to the source, so that an expert of a stack is read alone.

    Args:
        shape: the shape of the whole tensor.
        dtype: its dtype.
        read: gives the part in a box, as a tensor on the CPU of the box's shape.
    """

    def __init__(self, shape: Sequence[int], dtype: torch.dtype, read: Callable[[Box], Tensor]):
        self.shape = torch.Size(shape)
        self.dtype = dtype
        self._read = read

    @staticmethod
    def from_tensor(tensor: Tensor) -> "LazyTensor":
        """A tensor that is in memory already."""
        return LazyTensor(tensor.shape, tensor.dtype, lambda box: tensor[box])

    @staticmethod
    def full(shape: Sequence[int], value: float, dtype: torch.dtype) -> "LazyTensor":
        """A tensor with the same value everywhere."""
        return LazyTensor(
            shape,
            dtype,
            lambda box: torch.full([s.stop - s.start for s in box], value, dtype=dtype),
        )

    @property
    def nbytes(self) -> int:
        """Size of the values in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize

    def load(self) -> Tensor:
        """Read the values: a contiguous tensor on the CPU.

        Raises:
            ConversionError: if the source cannot be read.
        """
        return self._read(_whole(self.shape)).contiguous()

    def narrow(self, dim: int, start: int, length: int) -> "LazyTensor":
        """``length`` entries of dimension ``dim`` from ``start`` on."""
        shape = list(self.shape)
        if not 0 <= start <= start + length <= shape[dim]:
            raise ConversionError(f"no entries {start} to {start + length} in {shape[dim]}")
        shape[dim] = length

        def read(box):
            part = slice(box[dim].start + start, box[dim].stop + start)
            return self._read((*box[:dim], part, *box[dim + 1 :]))

        return LazyTensor(shape, self.dtype, read)

    def split(self, sizes: Sequence[int], dim: int = 0) -> list["LazyTensor"]:
        """Consecutive parts of the given sizes, which must add up to the whole dimension."""
        if sum(sizes) != self.shape[dim]:
            raise ConversionError(f"a dimension of {self.shape[dim]} is not {list(sizes)} together")
        starts = itertools.accumulate(sizes, initial=0)
        return [self.narrow(dim, start, size) for start, size in zip(starts, sizes)]

    def chunk(self, count: int, dim: int = 0) -> list["LazyTensor"]:
        """``count`` equal parts."""
        return self.split([self.shape[dim] // count] * count, dim)

    def index(self, i: int) -> "LazyTensor":
        """Entry ``i`` of the first dimension, without that dimension."""
        row = self.narrow(0, i, 1)
        return LazyTensor(
            self.shape[1:], self.dtype, lambda box: row._read((slice(0, 1), *box)).squeeze(0)
        )

    def transpose(self, dim0: int = 0, dim1: int = 1) -> "LazyTensor":
        """Two dimensions exchanged."""

        def exchange(items):
            items = list(items)
            items[dim0], items[dim1] = items[dim1], items[dim0]
            return tuple(items)

        return LazyTensor(
            exchange(self.shape),
            self.dtype,
            lambda box: self._read(exchange(box)).transpose(dim0, dim1),
        )

    def cast(self, dtype: torch.dtype) -> "LazyTensor":
        """The same values, rounded to ``dtype``; loading refuses those that it would make infinite."""
        if dtype == self.dtype:
            return self

        def read(box):
            values = self._read(box)
            rounded = values.to(dtype)
            lost = rounded.isinf() & values.isfinite()
            if lost.any():
                name = str(dtype).removeprefix("torch.")
                raise ConversionError(
                    f"a weight of {values[lost][0].item():g} does not fit in {name}, whose largest "
                    f"number is {torch.finfo(dtype).max:g}; accepted: bf16 or fp32"
                )
            return rounded

        return LazyTensor(self.shape, dtype, read)

    def reshape(self, *shape: int) -> "LazyTensor":
        """The same values in another shape; reading a part reads the whole source."""
        if math.prod(shape) != math.prod(self.shape):
            raise ConversionError(f"{list(self.shape)} cannot take the shape {list(shape)}")
        return self.apply(lambda tensor: tensor.reshape(shape), shape)

    def apply(self, function: Callable[[Tensor], Tensor], shape: Sequence[int] | None = None):
        """``function`` of the whole tensor; it keeps the dtype, and the shape unless one is given."""
        shape = self.shape if shape is None else shape
        return LazyTensor(shape, self.dtype, lambda box: function(self.load())[box])


Tensors = dict[str, LazyTensor]
"""Tensors by name."""


def concatenate(parts: Sequence[LazyTensor], dim: int = 0) -> LazyTensor:
    """Tensors one after the other along ``dim``; dtypes and other dimensions must be equal."""
    _same([(p.dtype, *p.shape[:dim], *p.shape[dim + 1 :]) for p in parts])
    shape = list(parts[0].shape)
    shape[dim] = sum(part.shape[dim] for part in parts)

    def read(box):
        pieces, offset = [], 0
        for part in parts:
            size = part.shape[dim]
            start, stop = max(box[dim].start - offset, 0), min(box[dim].stop - offset, size)
            if start < stop:
                pieces.append(part._read((*box[:dim], slice(start, stop), *box[dim + 1 :])))
            offset += size
        return torch.cat(pieces, dim)

    return LazyTensor(shape, parts[0].dtype, read)


def stack(parts: Sequence[LazyTensor]) -> LazyTensor:
    """Tensors of one shape and dtype stacked along a new first dimension."""
    _same([(p.dtype, *p.shape) for p in parts])

    def read(box):
        return torch.stack([parts[i]._read(box[1:]) for i in range(box[0].start, box[0].stop)])

    return LazyTensor((len(parts), *parts[0].shape), parts[0].dtype, read)


def have_equal_values(one: LazyTensor, other: LazyTensor) -> bool:
    """Whether two tensors of one shape hold the same values; read some rows at a time."""
    if one.shape != other.shape:
        return False
    if not one.shape:
        return torch.equal(one.load(), other.cast(one.dtype).load())
    rows = max(1, _COMPARED_BYTES * one.shape[0] // max(one.nbytes, 1))
    for start in range(0, one.shape[0], rows):
        count = min(rows, one.shape[0] - start)
        first, second = (tensor.narrow(0, start, count).load() for tensor in (one, other))
        if not torch.equal(first, second.to(first.dtype)):
            return False
    return True


_COMPARED_BYTES = 64 * 2**20


def total_bytes(tensors: dict[str, LazyTensor]) -> int:
    """Size of all values in bytes."""
    return sum(tensor.nbytes for tensor in tensors.values())


def main_dtype(tensors: Mapping[str, LazyTensor]) -> torch.dtype:
    """The dtype of most bytes."""
    sizes: dict[torch.dtype, int] = {}
    for tensor in tensors.values():
        sizes[tensor.dtype] = sizes.get(tensor.dtype, 0) + tensor.nbytes
    return max(sizes, key=sizes.__getitem__)


@contextlib.contextmanager
def naming(place: str | os.PathLike) -> Iterator[None]:
    """Put the file or folder before the message of a ConversionError which does not name it yet."""
    try:
        yield
    except ConversionError as error:
        if str(place) in str(error):
            raise
        raise ConversionError(f"{place}: {error}") from error


def check_weights(tensors: Mapping[str, LazyTensor]) -> None:
    """Refuse weights that are no plain floats: quantised ones mean nothing without their scales.

    Raises:
        ConversionError: it names the first such tensor.
    """
    for name, tensor in tensors.items():
        if tensor.dtype not in WEIGHT_DTYPES:
            accepted = ", ".join(str(d).removeprefix("torch.") for d in WEIGHT_DTYPES)
            found = str(tensor.dtype).removeprefix("torch.")
            raise ConversionError(f"tensor {name} is {found}; accepted: {accepted}")


def check_tensors(
    tensors: Mapping[str, LazyTensor], expected: Mapping[str, Sequence[int]], said_by: str
) -> None:
    """Refuse tensors that are missing, left over or of another shape.

    Args:
        tensors: what is there.
        expected: shapes by name.
        said_by: where these come from, for errors.

    Raises:
        ConversionError: it names the first such tensor.
    """
    for name, shape in expected.items():
        if name not in tensors:
            raise ConversionError(f"tensor {name} is missing, by {said_by}")
        found = tensors[name].shape
        if tuple(found) != tuple(shape):
            raise ConversionError(
                f"tensor {name} has the shape {list(found)} instead of {list(shape)}, by {said_by}"
            )
    for name in tensors:
        if name not in expected:
            raise ConversionError(f"tensor {name} is left over, by {said_by} the model has none")


def _whole(shape: Sequence[int]) -> Box:
    return tuple(slice(0, size) for size in shape)


def _same(properties: list) -> None:
    if any(other != properties[0] for other in properties):
        raise ConversionError(f"parts of one tensor differ in dtype or shape: {set(properties)}")
