"""A checkpoint of unknown origin: nothing of it is executed when training loads it."""

import io
import os
import shutil
from pathlib import Path

import pytest
import torch

from megatron_scmoe.checkpoints.dcp_metadata import read_metadata
from tests import harness, small_run

STEP = 2
FLAGS = [*small_run.MODEL, *small_run.STEPS, "--mock-data", "--train-iters", str(STEP)]


class Touch:
    """A pickle of it makes a file when it is loaded."""

    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("saved")
    run = harness.run_pretrain([*FLAGS, "--save", str(folder)])
    assert run.status == 0, run.output
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "copy")


def harm(folder: Path, part: str, file: Path) -> None:
    """Put a pickle that makes ``file`` in the place of an object."""
    path = folder / f"iter_{STEP:07d}"
    places = read_metadata(path).storage_data.items()
    place = next(info for key, info in places if part in key.fqn)
    stream = io.BytesIO()
    torch.save(Touch(file), stream, _use_new_zipfile_serialization=False)
    content = stream.getvalue()
    assert len(content) <= place.length
    with open(path / place.relative_path, "r+b") as data:
        data.seek(place.offset)
        data.write(content.ljust(place.length, b"\0"))


# That .metadata is not executed either is in tests/unit/training/test_input_checks.py.
@pytest.mark.parametrize("part", ["common_state", "rng_state"])
def test_training_executes_nothing_of_it(part, folder, tmp_path):
    harm(folder, part, tmp_path / "executed")
    run = harness.run_pretrain([*FLAGS, "--load", str(folder), "--no-scmoe-verify-checkpoint"])
    assert not (tmp_path / "executed").exists()
    assert run.status != 0
    assert "posix.system" in run.output
