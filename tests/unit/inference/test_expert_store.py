"""Experts in files: where each weight lies, and that a file appears whole or not at all."""

import fcntl

import pytest
import torch

from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor
from megatron_scmoe.errors import InputError
from megatron_scmoe.inference.expert_store import (
    MappedExperts,
    Packing,
    write_expert_files,
)

SHAPES = {"linear_fc1.weight": (5, 7), "linear_fc1.bias": (5,), "linear_fc2.weight": (7, 5)}
EXPERTS = 3


@pytest.fixture
def checkpoint(tmp_path):
    folder = tmp_path / "checkpoint"
    folder.mkdir()
    (folder / ".metadata").write_bytes(b"one")
    (folder / "__0_0.distcp").touch()
    return folder


def random_layers(*numbers: int) -> dict[int, dict[str, torch.Tensor]]:
    return {
        number: {name: torch.randn(EXPERTS, *shape) for name, shape in SHAPES.items()}
        for number in numbers
    }


def lazy(layers):
    return {
        number: {name: LazyTensor.from_tensor(tensor) for name, tensor in weights.items()}
        for number, weights in layers.items()
    }


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
def test_what_was_written_is_mapped(tmp_path, checkpoint, dtype):
    packing = Packing(SHAPES, dtype)
    layers = random_layers(2, 4)
    files = write_expert_files(tmp_path / "experts", checkpoint, packing, lazy(layers))
    mapped = MappedExperts(files, packing.nbytes, first=1)
    for layer, weights in layers.items():
        for expert in range(EXPERTS - 1):
            mapped.announce((layer, expert))
            views = packing.views(mapped.row((layer, expert)))
            for name, tensor in weights.items():
                assert torch.equal(views[name], tensor[expert + 1].to(dtype))


def test_weights_begin_where_kernels_want_them():
    packing = Packing(SHAPES, torch.bfloat16)
    memory = torch.zeros(packing.nbytes, dtype=torch.uint8)
    starts = [view.data_ptr() - memory.data_ptr() for view in packing.views(memory).values()]
    assert [start % 256 for start in starts] == [0, 0, 0] and len(set(starts)) == 3
    assert packing.nbytes % 4096 == 0


def test_files_are_written_once(tmp_path, checkpoint):
    packing, layers = Packing(SHAPES, torch.float32), random_layers(2)
    (file,) = write_expert_files(tmp_path / "a", checkpoint, packing, lazy(layers)).values()
    before = file.stat().st_mtime_ns
    write_expert_files(tmp_path / "a", checkpoint, packing, lazy(layers))
    assert file.stat().st_mtime_ns == before


def test_an_interrupted_writing_leaves_no_file_and_is_taken_up(tmp_path, checkpoint):
    packing, layers = Packing(SHAPES, torch.float32), random_layers(2, 4)

    def stop(box):
        raise KeyboardInterrupt

    cut = lazy(layers)
    cut[4]["linear_fc2.weight"] = LazyTensor((EXPERTS, 7, 5), torch.float32, stop)
    folder = tmp_path / "experts"
    with pytest.raises(KeyboardInterrupt):
        write_expert_files(folder, checkpoint, packing, cut)
    there = {file.name for file in folder.iterdir()}
    assert there == {".lock", "experts.json", "layer_0002.experts"}
    assert len(write_expert_files(folder, checkpoint, packing, lazy(layers))) == 2


def test_a_checkpoint_saved_anew_is_another(tmp_path, checkpoint):
    packing, layers = Packing(SHAPES, torch.float32), lazy(random_layers(2))
    write_expert_files(tmp_path / "a", checkpoint, packing, layers)
    told = "it holds experts of another checkpoint; accepted: another folder"
    (checkpoint / ".metadata").write_bytes(b"two")
    with pytest.raises(InputError, match=told):
        write_expert_files(tmp_path / "a", checkpoint, packing, layers)
    for damaged in ("", "[]", "[" * 100_000):
        (tmp_path / "a" / "experts.json").write_text(damaged)
        with pytest.raises(InputError, match=told):
            write_expert_files(tmp_path / "a", checkpoint, packing, layers)


def test_a_whole_folder_need_not_be_writable(tmp_path, checkpoint, monkeypatch):
    packing, layers = Packing(SHAPES, torch.float32), lazy(random_layers(2))
    write_expert_files(tmp_path / "a", checkpoint, packing, layers)
    monkeypatch.setattr(fcntl, "flock", None)
    write_expert_files(tmp_path / "a", checkpoint, packing, layers)


def test_a_file_that_something_else_cut_is_refused(tmp_path, checkpoint):
    packing, layers = Packing(SHAPES, torch.float32), lazy(random_layers(2))
    (file,) = write_expert_files(tmp_path / "a", checkpoint, packing, layers).values()
    file.write_bytes(b"")
    with pytest.raises(InputError, match="has 0 bytes instead of 12288"):
        write_expert_files(tmp_path / "a", checkpoint, packing, layers)
