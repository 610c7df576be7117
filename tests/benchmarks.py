"""The modules of benchmarks/, which import each other by name."""

import importlib
import os
import sys
from pathlib import Path

from tests.tools import REPOSITORY

BENCHMARKS = REPOSITORY / "benchmarks"
RESULTS = BENCHMARKS / "results"


def benchmark(name: str):
    """A module of benchmarks/."""
    sys.path.insert(0, str(BENCHMARKS))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


def environment() -> dict[str, str]:
    """For a benchmark in a process of its own."""
    return os.environ | {"PYTHONPATH": str(REPOSITORY), "OMP_NUM_THREADS": "1"}


def stored(name: str) -> Path:
    """The file of a stored result."""
    return RESULTS / f"{name}.json"
