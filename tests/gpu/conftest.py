"""What takes long is started before the tests are collected, which imports Megatron as well."""

from tests import harness
from tests.gpu.rank_sets import EXACT, EXACT_ONE_QUEUE, GPUS, ONE_QUEUE


def pytest_collection(session) -> None:
    if session.config.option.collectonly or GPUS == 0:
        return
    harness.gpu_ranks()
    harness.gpu_ranks(EXACT)
    if GPUS > 1:
        harness.gpu_ranks(ONE_QUEUE)
        harness.gpu_ranks(EXACT_ONE_QUEUE)
    harness._context.Process(target=_build_extension).start()


def _build_extension() -> None:
    """Megatron compiles C++ (20 s) where an activation is recomputed for the first time."""
    from megatron.core.tensor_parallel.random import _get_share_storage

    _get_share_storage()
