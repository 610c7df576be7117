"""What the distribution carries beside its code."""

import re
import shutil
import subprocess
import sys
import tomllib
import zipfile

import pytest
import yaml

import megatron_scmoe
from tests.tools import REPOSITORY


@pytest.fixture(scope="module")
def wheel(tmp_path_factory) -> zipfile.ZipFile:
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
    return zipfile.ZipFile(file)


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
