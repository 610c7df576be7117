"""Megatron's checkpoints read and written without a process group, and refused if damaged."""

import os
import pickle
import shutil
from argparse import Namespace

import pytest
import torch
from megatron.core import dist_checkpointing

from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor
from megatron_scmoe.checkpoints.output_folder import new_folder
from megatron_scmoe.checkpoints.torch_dist import read_megatron
from megatron_scmoe.checkpoints.torch_dist_writer import _extra_states, _Writer, write_megatron
from megatron_scmoe.config import ScMoEConfig
from megatron_scmoe.errors import ConversionError
from tests import models
from tests.lazy import Counted

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


def test_an_interrupt_is_not_hidden_by_what_it_left_open(tmp_path):
    def read(box):
        try:
            raise KeyboardInterrupt
        finally:
            raise RuntimeError("unexpected pos 704 vs 598")  # PyTorch's, of the file it closes

    with pytest.raises(KeyboardInterrupt), new_folder(tmp_path / "out", 0) as folder:
        write_megatron(folder, ARGS, {"x": LazyTensor((2,), torch.float32, read)})
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


def nested_fields(path):
    (path / "metadata.json").write_text("[" * 100_000)
    return r"its metadata\.json is damaged"


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
        nested_fields,
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
