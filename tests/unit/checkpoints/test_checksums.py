"""A flipped bit of a tensor is noticed, and whose share of the bytes it is in."""

import itertools
import random
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor
from torch.distributed.checkpoint.api import CheckpointException

from megatron_scmoe.checkpoints import checksums
from megatron_scmoe.checkpoints.checksums import find_damage

TENSORS = ("bias", "experts", "weight")


def tensors() -> dict[str, torch.Tensor]:
    return {name: torch.arange(500.0) + number for number, name in enumerate(TENSORS)}


def sharded(values: dict[str, torch.Tensor]) -> dict:
    return {name: ShardedTensor.from_rank_offsets(name, value) for name, value in values.items()}


@pytest.fixture
def folder(tmp_path) -> Path:
    """A checkpoint, as Megatron writes it."""
    dist_checkpointing.save(sharded(tensors()) | {"iteration": 3}, str(tmp_path))
    return tmp_path


def flip(file: Path, place: int, bit: int = 0) -> None:
    content = bytearray(file.read_bytes())
    content[place] ^= 1 << bit
    file.write_bytes(content)


def test_what_was_saved_is_whole(folder):
    assert find_damage(folder) is None


def test_a_bit_of_a_tensor(folder):
    file = folder / "__0_0.distcp"
    flip(file, file.read_bytes().index(tensors()["experts"].numpy().tobytes()) + 100, bit=3)
    assert find_damage(folder) == (
        f"{file} is damaged: experts has another checksum than it was saved with"
    )


def test_no_bit_changes_what_is_loaded_unnoticed(folder):
    """Some bytes say nothing: padding, dates, the version of the archive."""
    file = folder / "__0_0.distcp"
    whole, generator = file.read_bytes(), random.Random(1)
    unnoticed = 0
    for _ in range(150):
        file.write_bytes(whole)
        flip(file, generator.randrange(len(whole)), generator.randrange(8))
        if find_damage(folder) is not None:
            continue
        unnoticed += 1
        try:
            loaded = dist_checkpointing.load(
                sharded({name: torch.zeros(500) for name in TENSORS}), str(folder)
            )
        except (CheckpointException, RuntimeError):
            continue  # PyTorch notices
        for name, value in tensors().items():
            assert torch.equal(loaded[name], value)
        assert loaded["iteration"] == 3
    assert unnoticed < 100


def test_the_ranks_shares_are_the_whole(folder):
    pieces = checksums._pieces(checksums.read_metadata(folder))
    assert {piece.name for piece in pieces} >= set(TENSORS)
    for ranks in (1, 2, 3, 100):
        shares = [list(checksums._share(pieces, rank, ranks)) for rank in range(ranks)]
        assert list(itertools.chain(*shares)) == pieces


def test_a_rank_reads_no_other_share(folder, monkeypatch):
    opened = []
    monkeypatch.setattr(checksums, "_flaw", lambda file, piece: opened.append(piece.name))
    find_damage(folder, part=0, parts=2)
    first = set(opened)
    find_damage(folder, part=1, parts=2)
    assert first and first.isdisjoint(opened[len(first) :])
