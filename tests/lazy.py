"""Lazy tensors of known values, and a source that counts what is read of it."""

import torch

from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor

A = torch.arange(24.0).reshape(4, 6)
B = torch.arange(100, 124.0).reshape(4, 6)


class Counted:
    """A source that knows how many bytes were read, and how many at once."""

    def __init__(self):
        self.total = self.largest = 0

    def tensor(self, values: torch.Tensor) -> LazyTensor:
        def read(box):
            part = values[box].clone()
            self.total += part.nbytes
            self.largest = max(self.largest, part.nbytes)
            return part

        return LazyTensor(values.shape, values.dtype, read)


def lazy(values: torch.Tensor) -> LazyTensor:
    return LazyTensor.from_tensor(values)
