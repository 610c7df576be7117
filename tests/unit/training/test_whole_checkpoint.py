"""A run loads what was saved: damage is refused, or set aside where that is asked for."""

import argparse
import shutil
import threading
from pathlib import Path

import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.dist_checkpointing import ShardedTensor

from megatron_scmoe.errors import InputError
from megatron_scmoe.training import whole_checkpoint

TRACKER = "latest_checkpointed_iteration.txt"


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    for step in (10, 20, 30):
        (folder / f"iter_{step:07d}").mkdir()
        tensor = ShardedTensor.from_rank_offsets("weight", torch.arange(1000.0) + step)
        dist_checkpointing.save({"weight": tensor}, str(folder / f"iter_{step:07d}"))
    (folder / TRACKER).write_text("30")
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "run")


def find(folder: Path, **changes) -> Path:
    args = argparse.Namespace(
        load=str(folder),
        save=None,
        ckpt_step=None,
        ckpt_format="torch_dist",
        scmoe_verify_checkpoint=True,
        scmoe_damaged_checkpoint="refuse",
    )
    vars(args).update(changes)
    return whole_checkpoint.find("--load", str(folder), args)


def flip(checkpoint: Path) -> None:
    file = checkpoint / "__0_0.distcp"
    content = bytearray(file.read_bytes())
    content[len(content) // 2] ^= 1
    file.write_bytes(content)


def test_the_last_one_is_found(folder):
    assert find(folder).name == "iter_0000030"
    assert find(folder, ckpt_step=20).name == "iter_0000020"


def test_a_step_beside_a_release_is_refused(folder):
    """Megatron loads the release, whatever the step."""
    shutil.copytree(folder / "iter_0000030", folder / "release")
    (folder / TRACKER).write_text("release")
    assert find(folder).name == "release"
    with pytest.raises(
        InputError, match=r" --ckpt-step 20: its tracker says release, .*, or echo 20 > "
    ):
        find(folder, ckpt_step=20)
    (folder / TRACKER).write_text("20\n")  # as it says
    assert find(folder).name == "iter_0000020"


def test_a_flipped_bit_is_refused(folder):
    flip(folder / "iter_0000030")
    with pytest.raises(InputError) as caught:
        find(folder)
    assert str(caught.value) == (
        f"--load {folder}: the checkpoint is not what was saved: {folder}/iter_0000030/__0_0.distcp "
        "is damaged: weight has another checksum than it was saved with; accepted: --ckpt-step 20, "
        "the complete checkpoint before it"
    )


def test_without_the_check_it_is_loaded(folder):
    flip(folder / "iter_0000030")
    assert find(folder, scmoe_verify_checkpoint=False).name == "iter_0000030"


def test_damage_is_skipped_and_set_aside(folder, capsys):
    flip(folder / "iter_0000030")
    (folder / "iter_0000020" / "__0_0.distcp").write_bytes(b"half")
    assert find(folder, scmoe_damaged_checkpoint="skip").name == "iter_0000010"
    assert (folder / "iter_0000030.damaged").is_dir()
    assert (folder / "iter_0000020").is_dir()  # nobody named it
    [line] = capsys.readouterr().out.splitlines()
    assert line.startswith(f"WARNING: --load {folder}: the checkpoint is not what was saved: ")
    assert line.endswith("; it is iter_0000030.damaged now; the run goes on from iter_0000010")


def test_a_step_that_is_named_is_not_skipped(folder):
    flip(folder / "iter_0000030")
    with pytest.raises(InputError):
        find(folder, ckpt_step=30, scmoe_damaged_checkpoint="skip")


def test_where_none_is_whole_it_is_refused(folder):
    for step in (10, 20, 30):
        (folder / f"iter_{step:07d}" / ".metadata").unlink()
    with pytest.raises(InputError, match="no checkpoint in this one is complete"):
        find(folder, scmoe_damaged_checkpoint="skip")


def test_an_empty_tracker_means_the_newest(folder, capsys):
    """Its writer was ended, or the disk full; the checkpoint was complete by then."""
    (folder / TRACKER).write_text("")
    path = find(folder)
    assert path.name == "iter_0000030"
    assert capsys.readouterr().out.endswith("; the run goes on from iter_0000030\n")
    assert (folder / TRACKER).read_text() == "30"  # Megatron ends at an empty one


def test_a_lost_tracker_means_the_newest_that_is_complete(folder, capsys):
    """The run would write over what was saved, or a first save was ended just before it."""
    (folder / TRACKER).unlink()
    (folder / "iter_0000030" / "metadata.json").unlink()
    assert find(folder, save=f"{folder}/.").name == "iter_0000020"
    assert capsys.readouterr().out == (
        f"WARNING: --load {folder}: {folder}/{TRACKER} is missing; the run goes on from iter_0000020\n"
    )
    assert (folder / TRACKER).read_text() == "20"


@pytest.mark.parametrize("tracker", [None, ""], ids=["lost", "empty"])
def test_without_a_tracker_a_release_is_taken_where_no_iteration_is_complete(
    tracker, folder, capsys
):
    """What convert and upcycle write; the run would begin at random beside it."""
    (folder / TRACKER).unlink()
    if tracker is not None:
        (folder / TRACKER).write_text(tracker)
    shutil.copytree(folder / "iter_0000030", folder / "release")
    for step in (10, 20, 30):
        (folder / f"iter_{step:07d}" / "metadata.json").unlink()
    assert find(folder, save=str(folder)).name == "release"
    assert capsys.readouterr().out.endswith("; the run goes on from release\n")
    assert (folder / TRACKER).read_text() == "release"


def test_a_damaged_release_is_refused_however_it_is_found(folder):
    shutil.move(folder / "iter_0000030", folder / "release")
    for step in (10, 20):
        shutil.rmtree(folder / f"iter_{step:07d}")
    flip(folder / "release")
    for is_lost in (False, True):
        (folder / TRACKER).write_text("release")
        if is_lost:
            (folder / TRACKER).unlink()
        with pytest.raises(InputError) as caught:
            find(folder, save=str(folder), scmoe_damaged_checkpoint="skip")
        assert str(caught.value).startswith(
            f"--load {folder}: the checkpoint is not what was saved: {folder}/release/__0_0.distcp"
        )
        assert str(caught.value).endswith("accepted: another folder")


def test_skipping_ends_at_a_release(folder):
    shutil.copytree(folder / "iter_0000010", folder / "release")
    for step in (10, 20, 30):
        flip(folder / f"iter_{step:07d}")
    assert find(folder, scmoe_damaged_checkpoint="skip").name == "release"
    assert (folder / "iter_0000030.damaged").is_dir()
    assert (folder / TRACKER).read_text() == "release"  # --ckpt-step cannot name it


class TestAnotherHost:
    """It sees what the first rank writes some time later, as over NFS."""

    @pytest.fixture(autouse=True)
    def second_rank(self, folder, monkeypatch):
        (folder / TRACKER).unlink()
        monkeypatch.setenv("RANK", "1")

    def test_goes_on_when_it_sees_the_tracker(self, folder):
        def write():
            (folder / TRACKER).write_text("30")

        first_rank = threading.Timer(0.3, write)
        first_rank.start()
        assert find(folder, save=str(folder), scmoe_verify_checkpoint=False).name == "iter_0000030"
        assert (folder / TRACKER).is_file()
        first_rank.join()

    def test_is_told_if_it_never_does(self, folder, monkeypatch):
        monkeypatch.setattr(whole_checkpoint, "SEEN_WITHIN_S", 0)
        with pytest.raises(InputError) as caught:
            find(folder, save=str(folder), scmoe_verify_checkpoint=False)
        assert str(caught.value) == (
            f"--load {folder}: the first rank has named iter_0000030 there, and rank 1 does not see "
            "it after 0 s; accepted: a folder that all hosts share"
        )


def test_nothing_is_written_where_nothing_is_saved(folder, tmp_path):
    (folder / TRACKER).unlink()
    with pytest.raises(InputError, match=f"echo 30 > {folder}/{TRACKER}$"):
        find(folder, save=str(tmp_path / "other"))
    assert not (folder / TRACKER).exists()


def test_megatron_is_told_the_step_only_if_its_tracker_names_another(folder):
    args = argparse.Namespace(ckpt_step=None)
    assert whole_checkpoint.step_to_name(args, folder / "iter_0000030") == {}
    assert whole_checkpoint.step_to_name(args, folder / "iter_0000020") == {"ckpt_step": 20}
    assert whole_checkpoint.step_to_name(args, folder / "release") == {}
