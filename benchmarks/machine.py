"""What a benchmark runs on: its ranks and their process groups, and what a result says of them.

Imported before Megatron: where there is no GPU, CUDA is mapped to the CPU.
"""

import logging
import os
import tempfile
import time
from importlib import metadata

from megatron_scmoe.platform import cpu_backend, log_filters

ON_CPU = cpu_backend.enable_if_no_gpu()
log_filters.install()
logging.getLogger("megatron").setLevel(logging.ERROR)  # lists of parameters, before every table

import torch
import yaml
from link import link_name
from megatron.core import parallel_state, tensor_parallel
from megatron.core.num_microbatches_calculator import init_num_microbatches_calculator
from megatron.core.transformer.moe.router import MoEAuxLossAutoScaler

PACKAGES = ("torch", "megatron-core", "transformer-engine")
"""Whose versions a result names."""

VARIABLES = ("NCCL_", "NVTE_", "CUDA_DEVICE_MAX")
"""How the environment variables begin that a result names."""


def initialise(ep_channels: int | None, ep_high_priority: bool, graphs: bool = False) -> None:
    """Process groups, with all ranks in the expert group, and random states."""
    settings: dict = {}
    if ep_channels:
        settings |= {"min_ctas": 1, "max_ctas": ep_channels}
    if ep_high_priority:
        settings["is_high_priority_stream"] = True
    if ON_CPU:
        torch.set_num_threads(1)
    else:
        torch.cuda.set_device(int(os.environ.get("LOCAL_RANK", 0)))
    torch.distributed.init_process_group("gloo" if ON_CPU else "nccl")
    with tempfile.NamedTemporaryFile("w", suffix=".yaml") as channels:
        if settings:
            yaml.safe_dump({"ep": settings}, channels)
            channels.flush()
        parallel_state.initialize_model_parallel(
            expert_model_parallel_size=torch.distributed.get_world_size(),
            nccl_communicator_config_path=channels.name if settings else None,
        )
    tensor_parallel.model_parallel_cuda_manual_seed(1, te_rng_tracker=graphs)
    if graphs:  # as Megatron's entry point does
        init_num_microbatches_calculator(0, None, 1, 1, 1)
        torch.cuda.set_stream(torch.cuda.Stream())
    MoEAuxLossAutoScaler.set_loss_scale(torch.ones(1).cuda())


def describe() -> dict:
    """Environment, versions, link, device, number of ranks and date, as a result names them."""
    return {
        "environment": {
            name: value for name, value in sorted(os.environ.items()) if name.startswith(VARIABLES)
        },
        "versions": {name: _installed_version(name) for name in PACKAGES},
        "link": link_name(ON_CPU),
        "device": "cpu" if ON_CPU else torch.cuda.get_device_name(),
        "world_size": torch.distributed.get_world_size(),
        "date": time.strftime("%Y-%m-%d"),
    }


def _installed_version(package: str) -> str | None:
    """None if it is not installed."""
    try:
        return metadata.version(package)
    except metadata.PackageNotFoundError:
        return None
