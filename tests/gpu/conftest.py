"""GPUs' ranks are started when the first test here is about to run, all sets of them at once."""

import pytest

from tests import harness
from tests.gpu.test_gpu import EXACT, GPUS, ONE_QUEUE


@pytest.fixture(scope="session", autouse=True)
def _resident_ranks():
    if GPUS:
        harness.gpu_ranks()
        harness.gpu_ranks(EXACT)
    if GPUS > 1:
        harness.gpu_ranks(ONE_QUEUE)
