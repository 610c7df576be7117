"""Folders with safetensors files: written in shards, read lazily, refused if damaged."""

import json

import pytest
import torch

from megatron_scmoe.checkpoints.lazy_tensor import total_bytes
from megatron_scmoe.checkpoints.safetensors_folder import read_safetensors, write_safetensors
from megatron_scmoe.errors import ConversionError
from tests.lazy import A, B, Counted, lazy

TENSORS = {
    "a": A,
    "b": B.bfloat16(),
    "scalar": torch.tensor(3),
    "bytes": torch.arange(5, dtype=torch.uint8),
    "half": torch.randn(7, 3).half(),
}


def write(folder, **options) -> None:
    folder.mkdir(exist_ok=True)
    write_safetensors(folder, {k: lazy(v) for k, v in TENSORS.items()}, **options)


@pytest.mark.parametrize("size", ["5GB", 100])
def test_safetensors_round_trip(tmp_path, size):
    write(tmp_path, max_shard_size=size)
    assert len(list(tmp_path.glob("*.safetensors"))) == (1 if size == "5GB" else 3)
    found = read_safetensors(tmp_path)
    assert found.keys() == TENSORS.keys()
    for name, expected in TENSORS.items():
        assert found[name].dtype == expected.dtype and found[name].shape == expected.shape
        assert torch.equal(found[name].load(), expected)
    assert torch.equal(found["a"].narrow(1, 1, 2).load(), A[:, 1:3])


def test_shards_bound_the_memory(tmp_path):
    counted = Counted()
    tensors = {str(i): counted.tensor(torch.zeros(1000)) for i in range(20)}
    write_safetensors(tmp_path, tensors, max_shard_size=8000)
    assert len(list(tmp_path.glob("*.safetensors"))) == 10
    assert counted.total == total_bytes(tensors)


def break_missing(folder):
    next(iter(folder.glob("*00002*"))).unlink()
    return "00002-of-.*no such file"


def break_truncated(folder):
    file = next(iter(folder.glob("*00002*")))
    file.write_bytes(file.read_bytes()[:-1])
    return "00002-of-.*truncated"


def break_renamed(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    content["weight_map"]["x"] = content["weight_map"].pop("a")
    index.write_text(json.dumps(content))
    return "no tensor x"


def break_left_over(folder):
    index = folder / "model.safetensors.index.json"
    content = json.loads(index.read_text())
    where = content["weight_map"]
    where["b"] = where.pop("a")  # a and b lie in different files
    index.write_text(json.dumps(content))
    return "no tensor b|tensor a is not in"


def break_index(folder):
    (folder / "model.safetensors.index.json").write_text("{")
    return "index.json: not JSON"


def break_outside(folder):
    index = folder / "model.safetensors.index.json"
    index.write_text(json.dumps({"weight_map": {"a": "../model.safetensors"}}))
    return "not a file of this folder"


@pytest.mark.parametrize(
    "damage",
    [
        break_missing,
        break_truncated,
        break_renamed,
        break_left_over,
        break_index,
        break_outside,
    ],
)
def test_damaged_safetensors_are_refused_in_one_line(tmp_path, damage):
    write(tmp_path, max_shard_size=100)
    expected = damage(tmp_path)
    with pytest.raises(ConversionError, match=expected) as caught:
        read_safetensors(tmp_path)
    assert "\n" not in str(caught.value)


def test_a_folder_without_weights_is_refused(tmp_path):
    with pytest.raises(ConversionError, match=r"neither model\.safetensors"):
        read_safetensors(tmp_path)
    with pytest.raises(ConversionError, match="--max-shard-size 5 apples"):
        write_safetensors(tmp_path, {"a": lazy(A)}, "5 apples")
