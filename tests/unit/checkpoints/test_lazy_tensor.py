"""Lazy tensors: the operations are torch's, and only what is wanted is read."""

import pytest
import torch

from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor, concatenate, stack
from megatron_scmoe.errors import ConversionError
from tests.lazy import A, B, Counted, lazy

OPERATIONS = {
    "narrow": (lambda a, b: a.narrow(1, 2, 3), A.narrow(1, 2, 3)),
    "chunk": (lambda a, b: a.chunk(2)[1], A.chunk(2)[1]),
    "split": (lambda a, b: a.split([2, 4], dim=1)[1], A[:, 2:]),
    "index": (lambda a, b: a.index(3), A[3]),
    "transpose": (lambda a, b: a.transpose(), A.T),
    "cast": (lambda a, b: a.cast(torch.bfloat16), A.bfloat16()),
    "reshape": (lambda a, b: a.reshape(8, 3), A.reshape(8, 3)),
    "apply": (lambda a, b: a.apply(torch.neg), -A),
    "concatenate": (lambda a, b: concatenate([a, b]), torch.cat([A, B])),
    "concatenate columns": (lambda a, b: concatenate([a, b], 1), torch.cat([A, B], 1)),
    "stack": (lambda a, b: stack([a, b]), torch.stack([A, B])),
    "full": (lambda a, b: LazyTensor.full((4, 6), 2.0, torch.float32), torch.full((4, 6), 2.0)),
    "nested": (
        lambda a, b: stack([a.transpose(), b.transpose()]).index(1).chunk(2)[0],
        B.T.chunk(2)[0],
    ),
}


@pytest.mark.parametrize("name", OPERATIONS)
def test_operations_are_those_of_torch(name):
    operation, expected = OPERATIONS[name]
    actual = operation(lazy(A), lazy(B))
    assert actual.shape == expected.shape and actual.dtype == expected.dtype
    assert torch.equal(actual.load(), expected)
    for dim in range(expected.dim()):  # and of any part
        for start in range(expected.shape[dim]):
            part = actual.narrow(dim, start, 1).load()
            assert torch.equal(part, expected.narrow(dim, start, 1))


def test_nothing_is_read_before_load_and_only_the_part_wanted():
    counted = Counted()
    experts = stack([counted.tensor(A), counted.tensor(B)]).cast(torch.float64)
    up = experts.index(1).chunk(2)[0].transpose()
    assert counted.total == 0
    assert torch.equal(up.load(), B[:2].double().T)
    assert counted.total == B[:2].nbytes


def test_parts_that_do_not_fit_are_refused():
    for wrong in (
        lambda: concatenate([lazy(A), lazy(B[:, 1:])]),
        lambda: stack([lazy(A), lazy(B.double())]),
        lambda: lazy(A).split([1, 2]),
        lambda: lazy(A).chunk(3),
        lambda: lazy(A).reshape(5, 5),
        lambda: lazy(A).narrow(0, 3, 2),
    ):
        with pytest.raises(ConversionError):
            wrong()
