"""Experts in pinned memory: Transformer Engine's grouped experts, bf16, copies on a stream.

Needs one GPU and Transformer Engine.
"""

import importlib.util

import pytest

from tests.gpu.rank_sets import GPUS
from tests.harness import run_distributed
from tests.unit.benchmarks.test_offloading import check, measured

pytestmark = [
    pytest.mark.skipif(GPUS == 0, reason="needs a GPU"),
    pytest.mark.skipif(
        importlib.util.find_spec("transformer_engine") is None, reason="needs Transformer Engine"
    ),
]


def test_every_mode_writes_the_same(tmp_path):
    ((found, _),) = run_distributed(measured, 1, tmp_path)
    check(found)
    for row in found["modes"].values():
        assert row["peak_memory_mb"] > 0
