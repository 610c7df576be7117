"""What is written appears whole or not at all, and what was there before survives a failure."""

import os
from pathlib import Path

import pytest

from megatron_scmoe.platform.atomic_write import atomic_write
from megatron_scmoe.platform.command_line import DiskFullError, UsageError, staged_outputs


def content(folder: Path) -> dict[str, str]:
    """Every file below a folder, hidden ones too."""
    return {str(p.relative_to(folder)): p.read_text() for p in folder.rglob("*") if p.is_file()}


def write(paths, text: str) -> None:
    for path in paths:
        path.write_text(text)


@pytest.fixture
def targets(tmp_path):
    """Two files that are there, and one that is not."""
    write([tmp_path / "a", tmp_path / "b"], "old")
    return [tmp_path / name for name in "abc"]


def test_files_appear_together_at_the_end(tmp_path, targets):
    with atomic_write(*targets) as written:
        write(written, "new")
        assert [path.name for path in written] == ["a", "b", "c"]
        assert [path.read_text() for path in targets[:2]] == ["old", "old"]
        assert not targets[2].exists()
    assert content(tmp_path) == dict(a="new", b="new", c="new")
    assert len(list(tmp_path.iterdir())) == 3


@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
def test_after_an_error_all_is_as_it_was(tmp_path, targets, error):
    with pytest.raises(error), atomic_write(*targets) as written:
        write(written, "new")
        raise error
    assert content(tmp_path) == dict(a="old", b="old")
    assert len(list(tmp_path.iterdir())) == 2


@pytest.mark.parametrize("folder,name", [("", "b"), ("new", "a"), ("new", "b"), ("new", "c")])
def test_an_error_between_two_files_brings_the_old_ones_back(
    tmp_path, targets, monkeypatch, folder, name
):
    """While an old one leaves, or while a new one comes."""
    rename = Path.rename

    def fails(self, target):
        is_new = self.parent.name == "new"
        if self.name == name and is_new == bool(folder) and not fails.done:
            fails.done = True
            raise KeyboardInterrupt
        return rename(self, target)

    fails.done = False
    with pytest.raises(KeyboardInterrupt), atomic_write(*targets) as written:
        write(written, "new")
        monkeypatch.setattr(Path, "rename", fails)
    assert content(tmp_path) == dict(a="old", b="old")
    assert len(list(tmp_path.iterdir())) == 2


def test_one_file_takes_the_place_of_another_at_once(tmp_path, monkeypatch):
    """No reader finds it missing: it is never moved away first."""
    write([tmp_path / "times.json"], "old")
    monkeypatch.setattr(Path, "rename", lambda *args: pytest.fail("moved"))
    with atomic_write(tmp_path / "times.json") as (file,):
        file.write_text("new")
    assert content(tmp_path) == {"times.json": "new"}


def test_a_file_that_was_not_written_is_missed_before_the_old_one_goes(tmp_path, targets):
    with pytest.raises(FileNotFoundError), atomic_write(*targets) as written:
        write(written[:1], "new")
    assert content(tmp_path) == dict(a="old", b="old")


def test_a_file_replaces_no_folder(tmp_path):
    (tmp_path / "figures").mkdir()
    write([tmp_path / "figures" / "one"], "old")
    with pytest.raises(IsADirectoryError), atomic_write(tmp_path / "figures") as (file,):
        file.write_text("new")
    assert content(tmp_path) == {"figures/one": "old"}


def test_files_have_the_permissions_that_the_users_umask_gives(tmp_path):
    with atomic_write(tmp_path / "a") as (file,):
        file.touch()
    umask = os.umask(0)
    os.umask(umask)
    assert (tmp_path / "a").stat().st_mode & 0o777 == 0o666 & ~umask


def test_a_place_where_nothing_can_be_written_is_refused_by_flag(tmp_path):
    (tmp_path / "file").touch()
    place = tmp_path / "file" / "plot.png"
    with (
        pytest.raises(UsageError, match=f"^--output: cannot write in {place.parent} "),
        staged_outputs("--output", [place]),
    ):
        pytest.fail("entered")


def test_a_full_disk_is_said_by_the_flag(tmp_path):
    said = f"--output {tmp_path}/out: the disk is full; accepted: a folder on another disk"
    with (
        pytest.raises(DiskFullError, match=said) as full,
        staged_outputs("--output", [tmp_path / "out"]),
        open("/dev/full", "w") as file,
    ):
        file.write("a")
        file.flush()
    assert full.value.status == 1
    assert list(tmp_path.iterdir()) == []
