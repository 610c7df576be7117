"""What takes long is started before the tests are collected, which imports Megatron as well."""

from tests import harness
from tests.gpu.rank_sets import EXACT, EXACT_ONE_QUEUE, GPUS, HOST_STAGED


def pytest_collection(session) -> None:
    config = session.config
    # With --numprocesses tests run in workers; the process that deals them out needs no ranks.
    deals_out = config.getoption("dist", "no") != "no" and not hasattr(config, "workerinput")
    if config.option.collectonly or deals_out or GPUS == 0:
        return
    harness.gpu_ranks()
    harness.gpu_ranks(EXACT)
    if GPUS > 1:
        harness.gpu_ranks(EXACT_ONE_QUEUE)
        harness.gpu_ranks(HOST_STAGED)
    harness._context.Process(target=_build_extension).start()


def _build_extension() -> None:
    """Megatron compiles C++ (20 s) where an activation is recomputed for the first time."""
    from megatron.core.tensor_parallel.random import _get_share_storage

    _get_share_storage()
