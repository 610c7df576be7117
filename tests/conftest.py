"""Every test process runs Megatron on the CPU where there is no GPU."""

import os
import tempfile

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Where transformers copies the modelling code of a model; it imports it from the first such place.
_modules = tempfile.TemporaryDirectory()
os.environ["HF_MODULES_CACHE"] = _modules.name

from megatron_scmoe.platform import cpu_backend

cpu_backend.enable_if_no_gpu()

import pytest
import torch


@pytest.fixture(scope="session", autouse=True)
def _process_group(tmp_path_factory):
    """A process group of one rank, for tests that build models in this process."""
    store = tmp_path_factory.mktemp("store") / "store"
    backend = "gloo" if cpu_backend.is_enabled() else "nccl"
    torch.distributed.init_process_group(
        backend, init_method=f"file://{store}", rank=0, world_size=1
    )
    torch.set_num_threads(1)
    yield
    torch.distributed.destroy_process_group()
