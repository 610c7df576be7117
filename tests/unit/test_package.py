"""What the distribution carries beside its code."""

import os
import re
import shutil
import subprocess
import sys
import tomllib
import zipfile
from pathlib import Path

import pytest
import yaml

import megatron_scmoe
from tests.tools import REPOSITORY


@pytest.fixture(scope="module")
def wheel_file(tmp_path_factory) -> Path:
    """The wheel that pip would build, from a copy: a build leaves files beside its sources."""
    source = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "LICENSE", "README.md"):
        shutil.copy(REPOSITORY / name, source)
    ignored = shutil.ignore_patterns("__pycache__")
    shutil.copytree(REPOSITORY / "megatron_scmoe", source / "megatron_scmoe", ignore=ignored)
    build = "import setuptools.build_meta as backend; backend.build_wheel('dist')"
    subprocess.run(
        [sys.executable, "-c", build], cwd=source, check=True, capture_output=True, timeout=120
    )
    (file,) = (source / "dist").glob("*.whl")
    return file


@pytest.fixture(scope="module")
def wheel(wheel_file) -> zipfile.ZipFile:
    return zipfile.ZipFile(wheel_file)


@pytest.fixture(scope="module")
def installed(wheel_file, tmp_path_factory) -> Path:
    """Where pip has installed the wheel, without what it depends on."""
    folder = tmp_path_factory.mktemp("installed")
    pip = [sys.executable, "-m", "pip", "install", "--no-deps", "--no-index", "--no-compile"]
    subprocess.run(
        [*pip, "--target", folder, wheel_file], check=True, capture_output=True, timeout=120
    )
    return folder


def test_wheel_holds_the_licence(wheel):
    (name,) = (name for name in wheel.namelist() if name.endswith("licenses/LICENSE"))
    assert wheel.read(name) == (REPOSITORY / "LICENSE").read_bytes()
    (metadata,) = (name for name in wheel.namelist() if name.endswith("METADATA"))
    assert b"\nLicense-Expression: Apache-2.0\n" in wheel.read(metadata)


def test_wheel_holds_every_module(wheel):
    modules = (REPOSITORY / "megatron_scmoe").rglob("*.py")
    assert {str(file.relative_to(REPOSITORY)) for file in modules} <= set(wheel.namelist())


def test_wheel_tells_type_checkers_that_it_has_types(wheel):
    assert "megatron_scmoe/py.typed" in wheel.namelist()


def scmoe(installed: Path, *words: str) -> subprocess.CompletedProcess:
    """Call the console program that was installed, away from the checkout."""
    return subprocess.run(
        [sys.executable, "-X", "importtime", installed / "bin" / "scmoe", *words],
        env={**os.environ, "PYTHONPATH": str(installed)},
        cwd=installed,
        capture_output=True,
        text=True,
        timeout=120,
    )


def test_installed_program(installed):
    run = scmoe(installed, "--version")
    assert run.returncode == 0
    assert run.stdout == (
        f"megatron_scmoe {megatron_scmoe.__version__} from {installed / 'megatron_scmoe'}\n"
    )


def test_installed_program_shows_help_without_torch(installed):
    run = scmoe(installed, "--help")
    assert run.returncode == 0
    assert run.stdout.startswith("usage: scmoe COMMAND FLAGS")
    assert not re.search(r"\| +(torch|numpy|megatron)$", run.stderr, re.MULTILINE)


def test_installed_program_runs_a_command(installed):
    run = scmoe(installed, "evaluate", "--hf", "nothing", "--text", "nothing.txt")
    assert run.returncode == 2
    assert run.stderr.endswith("scmoe evaluate: error: --text nothing.txt: there is no such file\n")


def test_licence_is_apache_2():
    text = (REPOSITORY / "LICENSE").read_text()
    assert "Apache License\n                           Version 2.0, January 2004" in text
    assert "END OF TERMS AND CONDITIONS" in text
    assert "Copyright 2026 The megatron_scmoe authors" in text


def test_version_is_the_same_everywhere():
    citation = yaml.safe_load((REPOSITORY / "CITATION.cff").read_text())
    project = tomllib.loads((REPOSITORY / "pyproject.toml").read_text())["project"]
    assert citation["version"] == megatron_scmoe.__version__
    assert citation["license"] == project["license"]
    versions = re.findall(
        r"^## (\d+\.\d+\.\d+) ", (REPOSITORY / "CHANGELOG.md").read_text(), re.MULTILINE
    )
    assert versions[0] == megatron_scmoe.__version__


def test_image_imports_the_modules_of_a_run():
    """Its build fails if one of them does not load there: a folder of modules would load always."""
    check = (REPOSITORY / "docker" / "check_image.py").read_text()
    modules = re.findall(r"^import (megatron_scmoe\S*)", check, re.MULTILINE)
    assert modules
    for module in modules:
        assert (REPOSITORY / f"{module.replace('.', '/')}.py").is_file(), module
