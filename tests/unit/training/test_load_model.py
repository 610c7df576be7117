"""What a checkpoint of unknown origin may hold, and that none of it is run."""

import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedObject
from torch.distributed.checkpoint.filesystem import _StorageInfo
from torch.distributed.checkpoint.metadata import BytesStorageMetadata, MetadataIndex

from megatron_scmoe.checkpoints.dcp_metadata import read_metadata
from megatron_scmoe.checkpoints.torch_dist import read_megatron
from megatron_scmoe.errors import InputError
from megatron_scmoe.training import load_model
from tests import checkpoints, models

WEIGHT = "decoder.layers.0.mlp.linear_fc2.weight"


class Evil:
    def __reduce__(self):
        return os.system, ("touch executed",)


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A checkpoint saved by Megatron, the folder that ``--save`` would name."""
    models.init_parallel()
    folder = tmp_path_factory.mktemp("saved")
    checkpoints.save(checkpoints.arguments("pos2"), folder)
    return folder


@pytest.fixture
def copy(saved, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    return Path(shutil.copytree(saved, tmp_path / "copy"))


def save(folder: Path, common: dict | None = None, extra_state=None, **changes) -> None:
    """Save the model again, with other contents."""
    path = folder / "iter_0000007"
    args = read_megatron(path).args
    vars(args).update(changes)
    state = checkpoints.build(args).sharded_state_dict(metadata=models.checkpoint_metadata())
    for value in state.values():
        if isinstance(value, ShardedObject) and extra_state is not None:
            value.data = extra_state
    shutil.rmtree(path)
    path.mkdir()
    dist_checkpointing.save({**state, "args": args, **(common or {})}, str(path))


def evil_extra_state(folder):
    save(folder, extra_state=Evil())


def evil_common_state(folder):
    save(folder, common={"more": Evil()})
    return "it asks for posix.system"


def evil_common_state_of_an_older_version(folder):
    torch.save({"args": Evil()}, folder / "iter_0000007" / "common.pt")
    return "it asks for posix.system"


def evil_metadata(folder):
    (folder / "iter_0000007" / ".metadata").write_bytes(pickle.dumps(Evil()))
    return "it asks for posix.system"


def evil_metadata_beside_files_of_ranks(folder):
    part = folder / "iter_0000007" / "mp_rank_00"
    part.mkdir()
    torch.save({}, part / "model_optim_rng.pt")
    return evil_metadata(folder)


def evil_object_in_place_of_a_weight(folder):
    path = folder / "iter_0000007"
    metadata = read_metadata(path)
    torch.save([Evil()], path / "__1_0.distcp")
    entry = BytesStorageMetadata()
    entry.size = metadata.state_dict_metadata[WEIGHT].size  # for who compares shapes
    metadata.state_dict_metadata[WEIGHT] = entry
    place = _StorageInfo("__1_0.distcp", 0, (path / "__1_0.distcp").stat().st_size)
    metadata.storage_data[MetadataIndex(WEIGHT)] = place
    (path / ".metadata").write_bytes(pickle.dumps(metadata))
    return "copy"


def code_in_place_of_the_spec(folder):
    Path("evil.py").write_text("import os\nos.system('touch executed')\nspec = None\n")
    args = read_megatron(folder).args
    stock = {name: None for name in vars(args) if name.startswith("scmoe_")}
    path = folder / "iter_0000007"
    for name in stock:
        delattr(args, name)
    args.spec = ["evil", "spec"]
    shutil.rmtree(path)
    path.mkdir()
    dist_checkpointing.save({"args": args}, str(path))
    return "--spec evil spec"


@pytest.mark.parametrize(
    "attack",
    [
        evil_extra_state,
        evil_common_state,
        evil_common_state_of_an_older_version,
        evil_metadata,
        evil_metadata_beside_files_of_ranks,
        evil_object_in_place_of_a_weight,
        code_in_place_of_the_spec,
    ],
)
def test_nothing_of_a_checkpoint_is_run(copy, monkeypatch, attack):
    refusal = attack(copy)
    monkeypatch.syspath_prepend(os.getcwd())
    error = None
    try:
        load_model.build_model(load_model.Checkpoint(str(copy)), load_model.Layout())
    except InputError as caught:
        error = str(caught)
    finally:
        assert not Path("executed").exists()
    assert (error is None) == (refusal is None)
    if refusal is not None:
        assert refusal in error and "\n" not in error


def test_a_tokenizer_s_code_is_not_run(copy):
    folder = copy / "tokenizer"
    folder.mkdir()
    (folder / "code.py").write_text("import os\nos.system('touch executed')\nclass T: pass\n")
    (folder / "tokenizer_config.json").write_text(
        '{"tokenizer_class": "T", "auto_map": {"AutoTokenizer": ["code.T", null]}}'
    )
    (folder / "config.json").write_text('{"model_type": "llama"}')
    checkpoint = load_model.Checkpoint(str(copy))
    checkpoint.args.tokenizer_type = "HuggingFaceTokenizer"
    checkpoint.args.tokenizer_model = str(folder)
    checkpoint.args.trust_remote_code = True
    with pytest.raises(InputError):
        load_model.tokenizer_of(checkpoint)
    assert not Path("executed").exists()


def test_an_evil_extra_state_changes_no_weight(saved, copy):
    evil_extra_state(copy)
    model = load_model.build_model(load_model.Checkpoint(str(copy)), load_model.Layout())
    weight = read_megatron(copy).tensors[WEIGHT].load()
    assert torch.equal(model.get_parameter(WEIGHT), weight)


class TestSpecOfAnOlderVersion:
    """It saved ``--spec`` and none of ScMoE's fields: only $SCMOE_ARGS can say what the model is."""

    @pytest.fixture
    def older(self, copy):
        args = read_megatron(copy).args
        for name in [name for name in vars(args) if name.startswith("scmoe_")]:
            delattr(args, name)
        args.spec = ["megatron_scmoe.spec", "scmoe_spec"]
        path = copy / "iter_0000007"
        shutil.rmtree(path)
        path.mkdir()
        dist_checkpointing.save({"args": args}, str(path))
        return str(copy)

    def test_without_the_variable_it_is_refused(self, older, monkeypatch):
        monkeypatch.delenv("SCMOE_ARGS", raising=False)
        checkpoint = load_model.Checkpoint(older)
        with pytest.raises(InputError, match=r"without its --scmoe-\* flags; accepted: SCMOE_A"):
            checkpoint.scmoe(checkpoint.args)

    def test_with_it_it_is_what_that_says(self, older, monkeypatch):
        monkeypatch.setenv("SCMOE_ARGS", "--scmoe-tap pos1")
        checkpoint = load_model.Checkpoint(older)
        assert checkpoint.scmoe(checkpoint.args).tap == "pos1"
