"""Data that was made anew under its old name is not gone on with."""

import argparse
from pathlib import Path

import pytest

from megatron_scmoe.errors import InputError
from megatron_scmoe.training import data_identity
from megatron_scmoe.training.saved_run import SavedRun
from tests.small_run import write_dataset


def write(prefix: Path, seed: int, documents: int = 40) -> str:
    return str(write_dataset(prefix, documents, seed))


@pytest.fixture
def prefix(tmp_path) -> str:
    return write(tmp_path / "text", seed=1)


@pytest.fixture
def saved(prefix, tmp_path) -> SavedRun:
    args = argparse.Namespace(scmoe_tap="pos2")
    data_identity.keep(args, [prefix])
    return SavedRun("--load run", tmp_path / "iter_0000003", {"args": args}, True)


def run(**changes) -> argparse.Namespace:
    loader = {"dataloader_type": None, "data_sharding": True, "micro_batch_size": 2}
    sizes = (
        "world_size",
        *(f"{p}_parallel_size" for p in ("tensor_model", "pipeline_model", "context")),
    )
    begins = {"finetune": False, "scmoe_changed": None}
    return argparse.Namespace(**begins | loader | dict.fromkeys(sizes, 1) | changes)


def test_the_same_data_goes_on(prefix, saved):
    data_identity.check(run(), saved, [prefix])


@pytest.mark.parametrize("documents", [40, 41])
def test_data_made_anew_is_refused(documents, prefix, saved):
    write(Path(prefix), seed=2, documents=documents)
    with pytest.raises(InputError, match=f"^the data {prefix}: its files are not those that "):
        data_identity.check(run(), saved, [prefix])


CYCLIC = {"dataloader_type": "cyclic", "data_sharding": True, "data_parallel_size": 1}


class TestOrder:
    """Megatron counts the samples that were drawn, and goes on at that number of another order."""

    def told(self, saved, prefix, capsys, before=None, **changes) -> str:
        args = {"seed": 1, "seq_length": 8, "split": "9,1,0", "data_path": [prefix]}
        vars(saved.state["args"]).update(args, consumed_train_samples=8, **before or {})
        now = run(**args | {"skip_train": False} | changes)
        data_identity.check(now, saved, now.data_path)
        return capsys.readouterr().out

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({"seed": 2}, ("--seed 2: ", "--seed 1;")),
            ({"seq_length": 4}, ("--seq-length 4: ", "--seq-length 8;")),
            ({"split": "8,2,0"}, ("--split 8,2,0: ", "--split 9,1,0;")),
        ],
        ids=str,
    )
    def test_another_one_is_said(self, changes, words, saved, prefix, capsys):
        told = self.told(saved, prefix, capsys, **changes)
        assert told.startswith(f"WARNING: {words[0]}") and f"was trained with {words[1]}" in told

    @pytest.mark.parametrize("changes", [{}, {"split": "90,10"}, {"skip_train": True, "seed": 2}])
    def test_the_same(self, changes, saved, prefix, capsys):
        assert self.told(saved, prefix, capsys, **changes) == ""

    @pytest.mark.parametrize(
        ("changes", "words"),
        [
            ({}, ""),
            ({"dataloader_type": None}, "WARNING: no --dataloader-type: "),
            ({"world_size": 2, "tensor_model_parallel_size": 2}, ""),
            ({"world_size": 2}, "2 data-parallel replicas: "),
            ({"data_sharding": False}, "WARNING: --no-data-sharding, 1 data-parallel replicas: "),
        ],
    )
    def test_of_a_cyclic_loader(self, changes, words, saved, prefix, capsys):
        changes = {"dataloader_type": "cyclic"} | changes
        told = self.told(saved, prefix, capsys, CYCLIC, **changes)
        assert words in told and bool(words) == bool(told)

    @pytest.mark.parametrize("changes", [{"micro_batch_size": 3}, {"world_size": 8}])
    def test_a_cyclic_loader_goes_on_between_two_batches(self, changes, saved, prefix, capsys):
        with pytest.raises(InputError, match=r"has drawn 8 samples, .* draw (3|16) at once"):
            self.told(saved, prefix, capsys, CYCLIC, dataloader_type="cyclic", **changes)
        self.told(saved, prefix, capsys, CYCLIC, **changes)

    def test_a_single_loader_is_the_default(self, saved, prefix, capsys):
        assert self.told(saved, prefix, capsys, {"dataloader_type": "single"}, world_size=2) == ""

    def test_a_converted_checkpoint_says_names_alone(self, saved, prefix, capsys):
        del saved.state["args"].scmoe_data_identity
        assert self.told(saved, prefix, capsys) == ""
        told = self.told(saved, prefix, capsys, data_path=[f"{prefix[:-4]}./text"])
        assert told.startswith("WARNING: --data-path ")

    def test_data_that_was_moved(self, saved, prefix, capsys, tmp_path):
        moved = write(tmp_path / "moved", seed=1)
        assert self.told(saved, prefix, capsys, data_path=[moved]) == ""
        other = write(tmp_path / "other", seed=2)
        told = self.told(saved, prefix, capsys, data_path=[other])
        assert told.startswith(f"WARNING: --data-path {other}: ")


def test_another_name_is_other_data_on_purpose(saved, tmp_path):
    data_identity.check(run(), saved, [write(tmp_path / "other", seed=2)])


@pytest.mark.parametrize("changes", [{"finetune": True}, {"scmoe_changed": ["data-path"]}], ids=str)
def test_what_begins_anew_may_have_any(changes, prefix, saved):
    write(Path(prefix), seed=2)
    data_identity.check(run(**changes), saved, [prefix])


def test_checkpoints_of_older_versions_say_nothing(prefix, saved):
    del saved.state["args"].scmoe_data_identity
    data_identity.check(run(), saved, [prefix])
