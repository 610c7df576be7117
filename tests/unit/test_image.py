"""The Dockerfile, as far as it can be held to its word without building it."""

import os
import re
import subprocess
import sys
from importlib.metadata import version
from pathlib import Path

import pytest

from tests.tools import REPOSITORY

BIN = Path(sys.executable).parent
DOCKERFILE = (REPOSITORY / "Dockerfile").read_text()


@pytest.fixture(scope="module")
def image(tmp_path_factory) -> dict[str, str]:
    """The environment of a Python that has Transformer Engine too, by name."""
    folder = tmp_path_factory.mktemp("image")
    info = folder / "transformer_engine-2.9.0.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(
        "Metadata-Version: 2.1\nName: transformer_engine\nVersion: 2.9.0\n"
    )
    return os.environ | {"PYTHONPATH": str(folder)}


@pytest.fixture(scope="module")
def sorted_requirements(image, tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("sorted")
    command = [sys.executable, "docker/sort_requirements.py", folder]
    subprocess.run(command, cwd=REPOSITORY, env=image, check=True)
    return folder


def test_hadolint_finds_nothing():
    found = subprocess.run(
        [BIN / "hadolint", REPOSITORY / "Dockerfile"], capture_output=True, text=True
    )
    assert (found.returncode, found.stdout) == (0, "")


def test_what_came_with_the_image_is_kept(sorted_requirements):
    kept = (sorted_requirements / "kept.txt").read_text().split()
    assert f"torch=={version('torch')}" in kept
    assert "transformer_engine==2.9.0" in kept
    needs = (sorted_requirements / "needs.txt").read_text().split()
    assert {"tqdm", "matplotlib", "rich", "pytest", "pytest-xdist"} <= set(needs)
    assert not any(re.match("torch|numpy|megatron", line) for line in needs)
    assert (sorted_requirements / "alone.txt").read_text() == "megatron-core==0.19.2\n"


def test_the_install_step_can_be_solved_and_touches_nothing_that_is_kept(
    image, sorted_requirements
):
    """The Dockerfile's own command, on an environment that has it all: pip finds no conflict."""
    step = re.search(r"&& (pip install --constraint .*?) \\\n", DOCKERFILE)[1]
    words = step.replace("/opt/scmoe", str(sorted_requirements)).split()
    solved = subprocess.run(
        [sys.executable, "-m", *words, "--dry-run", "--no-index"],
        env=image,
        capture_output=True,
        text=True,
        timeout=120,
    )
    assert solved.returncode == 0, solved.stderr
    assert "Would install" not in solved.stdout


def test_an_image_without_transformer_engine_is_refused(tmp_path):
    refused = subprocess.run(
        [sys.executable, "docker/sort_requirements.py", tmp_path],
        cwd=REPOSITORY,
        capture_output=True,
        text=True,
    )
    assert refused.returncode == 1
    assert refused.stderr == "NGC_PYTORCH: the image has no transformer-engine\n"


def test_scripts_that_the_image_runs_are_there():
    for name in re.findall(r"docker/\w+\.\w+", DOCKERFILE):
        assert (REPOSITORY / name).is_file(), name
    assert os.access(REPOSITORY / "docker" / "smoke_test.sh", os.X_OK)


def test_make_uses_a_python_that_has_it_all():
    shown = make("test", f"PYTHON={sys.executable}")
    assert shown.startswith(f"{sys.executable} -m pytest ")
    assert "pip" not in shown


def test_make_builds_an_environment_with_one_that_has_not(tmp_path):
    bare = tmp_path / "python"
    bare.write_text("#!/bin/sh\nexit 1\n")
    bare.chmod(0o755)
    shown = make("test", f"PYTHON={bare}", f"VENV={tmp_path}/env")
    assert f"{bare} -m venv {tmp_path}/env" in shown
    assert f"{tmp_path}/env/bin/python -m pytest " in shown


def make(*words: str) -> str:
    # Under `make test` this would be a make within a make, with its flags and its announcements.
    outside = {k: v for k, v in os.environ.items() if k not in ("MAKEFLAGS", "MAKELEVEL", "MFLAGS")}
    shown = subprocess.run(
        ["make", "--dry-run", *words],
        cwd=REPOSITORY,
        env=outside,
        check=True,
        capture_output=True,
        text=True,
    )
    return shown.stdout
