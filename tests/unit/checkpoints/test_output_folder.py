"""The folder of a conversion is there when it is complete, and replaces nothing else."""

import errno
import os
import shutil
import sys
from argparse import Namespace
from pathlib import Path

import pytest
import torch
from safetensors import SafetensorError

from megatron_scmoe.checkpoints.output_folder import new_folder
from megatron_scmoe.checkpoints.safetensors_folder import write_safetensors
from megatron_scmoe.checkpoints.torch_dist_writer import write_megatron
from megatron_scmoe.errors import ConversionError
from tests.lazy import A, lazy

ARGS = Namespace(num_layers=4, params_dtype=torch.float32, tensor_model_parallel_size=1)


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
        if self.parent.name == "new":
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
