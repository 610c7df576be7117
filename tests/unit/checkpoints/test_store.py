"""Lazy tensors, new folders, safetensors folders and Megatron's checkpoints, each by itself."""

import errno
import json
import os
import pickle
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from safetensors import SafetensorError

from megatron_scmoe.checkpoints.folder import new_folder
from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor, concatenate, stack, total_bytes
from megatron_scmoe.checkpoints.safetensors_folder import read_safetensors, write_safetensors
from megatron_scmoe.checkpoints.torch_dist import (
    _extra_states,
    _Writer,
    read_megatron,
    write_megatron,
)
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.errors import ConversionError
from tests import models

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


def test_new_folder_appears_when_complete(tmp_path):
    with new_folder(tmp_path / "out", 0) as folder:
        (folder / "config.json").write_text("{}")
        assert not (tmp_path / "out").exists()
    assert os.listdir(tmp_path) == ["out"]
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "out").stat().st_mode & 0o777 == 0o777 & ~umask


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError, ConversionError])
def test_nothing_is_left_of_a_folder_that_fails(tmp_path, error):
    with pytest.raises(error), new_folder(tmp_path / "out", 0) as folder:
        (folder / "half").write_text("written")
        raise error
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "error,free",
    [
        (OSError(errno.ENOSPC, "No space left on device"), 10**12),
        (SafetensorError("I/O error: No space left on device (os error 28)"), 10**12),
        (RuntimeError("[enforce fail at inline_container.cc:672] unexpected pos"), 0),
    ],
)
def test_a_disk_that_fills_up_meanwhile_is_said_in_one_line(tmp_path, monkeypatch, error, free):
    """Each writer has its own words for it."""
    usage = shutil.disk_usage(tmp_path)
    with pytest.raises(ConversionError, match="the disk is full"), new_folder(tmp_path / "out", 0):
        monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=free))
        raise error
    assert os.listdir(tmp_path) == []


def test_other_errors_of_a_writer_come_out_as_they_are(tmp_path):
    with pytest.raises(RuntimeError, match=r"^unexpected$"), new_folder(tmp_path / "out", 0):
        raise RuntimeError("unexpected")


def test_an_interrupt_is_not_hidden_by_the_file_it_left_open(tmp_path):
    with pytest.raises(SystemExit) as caught, new_folder(tmp_path / "out", 0):
        try:
            sys.exit(143)
        finally:
            raise RuntimeError("unexpected pos")
    assert caught.value.code == 143
    assert os.listdir(tmp_path) == []


def write_model_folder(folder: Path) -> None:
    folder.mkdir()
    (folder / "config.json").write_text("{}")
    write_safetensors(folder, {"a": lazy(A)})


def test_an_existing_folder_needs_force_and_survives_a_failure(tmp_path):
    old = tmp_path / "out"
    write_model_folder(old)
    with pytest.raises(ConversionError, match="out: exists; --force"), new_folder(old, 0):
        pytest.fail("entered")
    with pytest.raises(KeyboardInterrupt), new_folder(old, 0, force=True):
        raise KeyboardInterrupt
    assert sorted(os.listdir(old)) == ["config.json", "model.safetensors"]
    with new_folder(old, 0, force=True) as folder:
        (folder / "new").touch()
    assert os.listdir(old) == ["new"] and os.listdir(tmp_path) == ["out"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError])
def test_the_old_folder_survives_an_error_while_the_new_one_takes_its_name(
    tmp_path, monkeypatch, error
):
    old = tmp_path / "out"
    write_model_folder(old)
    rename = Path.rename

    def fails_once(self, target):
        if self.name == "new":
            raise error
        return rename(self, target)

    monkeypatch.setattr(Path, "rename", fails_once)
    with pytest.raises(error), new_folder(old, 0, force=True) as folder:
        (folder / "new").touch()
    assert sorted(os.listdir(old)) == ["config.json", "model.safetensors"]
    assert os.listdir(tmp_path) == ["out"]


def only_a_thesis(path):
    path.mkdir()


def config_of_something_else(path):
    path.mkdir()
    (path / "config.json").write_text("{}")


def metadata_of_something_else(path):
    path.mkdir()
    (path / "metadata.json").write_text('["a", "b"]')
    (path / ".metadata").touch()


def one_iteration(path):
    (path.parent / "saved").mkdir()
    write_megatron(path.parent / "saved", ARGS, {"a": lazy(A)})
    (path.parent / "saved" / "release").rename(path)


def checkpoints_of_training(path):
    path.mkdir()
    write_megatron(path, ARGS, {"a": lazy(A)})


KINDS = {
    only_a_thesis: "home: exists and is no checkpoint",
    config_of_something_else: "home: exists and is no checkpoint",
    metadata_of_something_else: "home: exists and is no checkpoint",
    write_model_folder: "home/thesis.tex: no part of a checkpoint",
    one_iteration: "home/thesis.tex: no part of a checkpoint",
    checkpoints_of_training: "home/thesis.tex: no part of a checkpoint",
}


@pytest.mark.parametrize("kind", KINDS)
def test_force_replaces_checkpoints_only(tmp_path, kind):
    home = tmp_path / "home"
    kind(home)
    (home / "thesis.tex").touch()
    with pytest.raises(ConversionError, match=KINDS[kind]), new_folder(home, 0, force=True):
        pytest.fail("entered")
    assert (home / "thesis.tex").exists()
    (home / "thesis.tex").unlink()
    if "no part" in KINDS[kind]:  # without it, a checkpoint
        with new_folder(home, 0, force=True) as folder:
            (folder / "new").touch()
        assert os.listdir(home) == ["new"]


@pytest.mark.parametrize("source", ["out", "out/iter_0000001"])
def test_what_is_read_is_not_replaced(tmp_path, source):
    (tmp_path / source).mkdir(parents=True)
    (tmp_path / "out" / "config.json").touch()
    with (
        pytest.raises(ConversionError, match="holds what is read"),
        new_folder(tmp_path / "out", 0, force=True, sources=[tmp_path / source]),
    ):
        pytest.fail("entered")


def test_too_little_space_is_said_before_anything_is_written(tmp_path):
    with (
        pytest.raises(ConversionError, match=r"1000000\.\d+ GB are needed, [\d.]+ GB are free"),
        new_folder(tmp_path / "out", 10**15),
    ):
        pytest.fail("entered")
    assert os.listdir(tmp_path) == []


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


ARGS = Namespace(num_layers=4, params_dtype=torch.float32, tensor_model_parallel_size=1)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint saved by Megatron, and the folder that ``--save`` would name."""
    folder = tmp_path_factory.mktemp("saved")
    path = folder / "iter_0000003"
    path.mkdir()
    (model,) = models.build_scmoe(ScMoEConfig(combine="cg2", post_norm=True))
    state = model.sharded_state_dict(metadata=models.checkpoint_metadata())
    dist_checkpointing.save({**state, "args": ARGS, "iteration": 3}, str(path))
    (folder / "latest_checkpointed_iteration.txt").write_text("3")
    return folder


def plain_tensors(path) -> dict[str, torch.Tensor]:
    found = dist_checkpointing.load_plain_tensors(str(path))
    return {key: value for key, value in found.items() if isinstance(value, torch.Tensor)}


def test_reads_what_megatron_saved(saved):
    found = read_megatron(saved)
    assert found.iteration == 3 and found.args == ARGS
    assert found.layout == {"tensor_model_parallel_size": 1}
    expected = plain_tensors(saved / "iter_0000003")
    assert found.tensors.keys() == expected.keys()
    for key, value in expected.items():
        assert torch.equal(found.tensors[key].load(), value), key
    assert read_megatron(saved / "iter_0000003").tensors.keys() == expected.keys()


def test_an_expert_is_read_alone(saved):
    experts = read_megatron(saved).tensors["decoder.layers.1.mlp.experts.experts.linear_fc1.weight"]
    whole = experts.load()
    assert whole.shape == (4, 80, 32)
    assert torch.equal(experts.index(2).chunk(2)[1].load(), whole[2, 40:])


@pytest.mark.parametrize("file_bytes", [2**30, 5000])
def test_megatron_reads_what_is_written(saved, tmp_path, monkeypatch, file_bytes):
    monkeypatch.setattr(_Writer, "FILE_BYTES", file_bytes)
    source = read_megatron(saved)
    write_megatron(tmp_path, source.args, source.tensors)
    assert len(list(tmp_path.glob("release/*.distcp"))) == (1 if file_bytes > 2**20 else 40)
    (model,) = models.build_scmoe(ScMoEConfig(combine="cg2", post_norm=True))
    state = model.sharded_state_dict(metadata=models.checkpoint_metadata())
    loaded = dist_checkpointing.load(state, str(tmp_path / "release"))
    assert loaded.pop("args") == ARGS
    model.load_state_dict({k: v for k, v in loaded.items() if k in model.state_dict()}, strict=True)
    again = read_megatron(tmp_path)
    assert again.iteration == 0 and again.tensors.keys() == source.tensors.keys()
    for key, tensor in source.tensors.items():
        assert torch.equal(again.tensors[key].load(), tensor.load()), key


def test_a_norm_that_is_not_fused_gets_an_extra_state_under_the_fused_key():
    """Transformer Engine asks for it where dense MLP and router share the norm, as in LongCat."""
    fc1 = "decoder.layers.0.mlp.linear_fc1"
    keys = set(_extra_states(dict.fromkeys([f"{fc1}.weight", f"{fc1}.layer_norm_weight"])))
    wanted = {f"{fc1}._extra_state/shard_0_1", f"{fc1}.layer_norm__extra_state/shard_0_1"}
    assert wanted == keys


def test_writing_holds_one_expert_at_a_time(tmp_path):
    counted = Counted()
    experts = counted.tensor(torch.randn(16, 50, 10))
    key = "decoder.layers.0.mlp.experts.experts.linear_fc1.weight"
    write_megatron(tmp_path, ARGS, {key: experts})
    assert counted.total == experts.nbytes
    assert counted.largest == experts.nbytes / 16


@pytest.mark.parametrize("error", [ConversionError, KeyboardInterrupt])
def test_an_error_while_writing_comes_out_as_it_is(tmp_path, error):
    def read(box):
        raise error("tensor x: gone")

    tensors = {"x": LazyTensor((2,), torch.float32, read)}
    with pytest.raises(error), new_folder(tmp_path / "out", 0) as folder:
        write_megatron(folder, ARGS, tensors)
    assert os.listdir(tmp_path) == []


def test_equal_layers_saved_as_a_stack_get_one_key_each(tmp_path):
    scmoe = ScMoEConfig(tap="pos1")
    models.init_parallel()
    config = models.transformer_config(moe_layer_freq=1)
    (model,) = models.build_chunks(config, scmoe)
    for name, metadata in (("stack", None), ("single", models.checkpoint_metadata())):
        (tmp_path / name).mkdir()
        dist_checkpointing.save(model.sharded_state_dict(metadata=metadata), tmp_path / name)
    assert any(key.startswith("decoder.layers.mlp") for key in plain_tensors(tmp_path / "stack"))
    stacked, single = read_megatron(tmp_path / "stack"), read_megatron(tmp_path / "single")
    assert stacked.tensors.keys() == single.tensors.keys()
    for key, tensor in single.tensors.items():
        assert torch.equal(stacked.tensors[key].load(), tensor.load()), key


def test_a_norm_saved_by_the_local_implementation_gets_its_usual_key(tmp_path):
    models.init_parallel()
    (model,) = models.build_chunks(models.transformer_config(), ScMoEConfig(), local_norm_keys=True)
    state = model.sharded_state_dict(metadata=models.checkpoint_metadata())
    dist_checkpointing.save(state, tmp_path)
    assert "decoder.layers.1.mlp.linear_fc1.layer_norm_weight" in plain_tensors(tmp_path)
    tensors = read_megatron(tmp_path).tensors
    assert "decoder.layers.1.pre_mlp_layernorm.weight" in tensors
    assert "decoder.layers.0.mlp.linear_fc1.layer_norm_weight" in tensors


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


def evil_metadata(path):
    (path / ".metadata").write_bytes(pickle.dumps(Evil()))
    return r"\.metadata is unreadable \(it asks for posix\.system\)"


def evil_common(path):
    torch.save({"args": Evil()}, path / "common.pt")
    return r"common\.pt is unreadable \(it asks for posix\.system\)"


def truncated(path):
    file = path / "__0_0.distcp"
    file.write_bytes(file.read_bytes()[:-10])
    return r"__0_0\.distcp is truncated"


def gone(path):
    (path / "__0_0.distcp").unlink()
    return r"__0_0\.distcp is missing"


def no_metadata(path):
    (path / ".metadata").unlink()
    return r"\.metadata is missing"


def damaged_metadata(path):
    file = path / ".metadata"
    file.write_bytes(file.read_bytes()[:-100])
    return r"\.metadata is unreadable"


def not_torch_dist(path):
    (path / "metadata.json").unlink()
    return "no torch_dist checkpoint"


def wrong_tracker(path):
    (path.parent / "latest_checkpointed_iteration.txt").write_text("soon")
    return "'soon' is neither an iteration"


def tracker_of_another(path):
    (path.parent / "latest_checkpointed_iteration.txt").write_text("99")
    return "iter_0000099 is missing, .* there is iter_0000003: give the folder"


@pytest.mark.parametrize(
    "damage",
    [
        evil_metadata,
        evil_common,
        truncated,
        gone,
        no_metadata,
        damaged_metadata,
        not_torch_dist,
        wrong_tracker,
        tracker_of_another,
    ],
)
def test_damaged_checkpoints_are_refused_in_one_line(saved, tmp_path, monkeypatch, damage):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(saved, tmp_path / "copy")
    expected = damage(tmp_path / "copy" / "iter_0000003")
    with pytest.raises(ConversionError, match=expected) as caught:
        read_megatron(tmp_path / "copy")
    assert "\n" not in str(caught.value)
    assert not (tmp_path / "executed").exists()


def test_values_that_were_damaged_are_noticed_on_reading(saved, tmp_path):
    shutil.copytree(saved, tmp_path / "copy")
    file = tmp_path / "copy" / "iter_0000003" / "__0_0.distcp"
    file.write_bytes(b"\0" * file.stat().st_size)
    with pytest.raises(ConversionError):
        for tensor in read_megatron(tmp_path / "copy").tensors.values():
            tensor.load()
