"""A benchmark that measures is imported on a rank, not here."""

import sys

import pytest


@pytest.fixture(autouse=True)
def _nothing_measures_here():
    """machine.py sets what its process logs and warns of, for all tests that come later."""
    yield
    assert "machine" not in sys.modules, "benchmark() of a module that imports machine.py"
