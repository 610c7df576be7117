"""All sets of ranks are started before tests are collected: both import Megatron, at once."""

from tests import harness
from tests.gpu.rank_sets import EXACT, GPUS, ONE_QUEUE


def pytest_collection(session) -> None:
    if session.config.option.collectonly or GPUS == 0:
        return
    harness.gpu_ranks()
    harness.gpu_ranks(EXACT)
    if GPUS > 1:
        harness.gpu_ranks(ONE_QUEUE)
