"""Every test process runs Megatron on the CPU where there is no GPU."""

import os
import sys
import tempfile
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
# Without bytecode every process that a test starts compiles PyTorch and Megatron again, which takes ten
# seconds. Where none may lie beside the sources it has a folder of its own.
if os.environ.pop("PYTHONDONTWRITEBYTECODE", None):
    sys.dont_write_bytecode = False
    sys.pycache_prefix = sys.pycache_prefix or str(Path(__file__).parents[1] / "build" / "bytecode")
    os.environ["PYTHONPYCACHEPREFIX"] = sys.pycache_prefix
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
