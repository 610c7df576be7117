"""How a run begins: the process before Megatron is imported, and the rank that a launcher has given."""

import contextlib
import os
import secrets
import socket

import torch

from megatron_scmoe.platform import cpu_backend, log_filters
from megatron_scmoe.platform.command_line import UsageError

_OF_A_RANK = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
_OTHER_LAUNCHERS = {
    "SLURM_STEP_NUM_TASKS": "srun",
    "OMPI_COMM_WORLD_SIZE": "mpirun",
    "PMI_SIZE": "mpirun",
}
"""What says how many processes a launcher has started that does not set torchrun's variables."""


def before_megatron() -> None:
    """Prepare the process of a run; call it before anything of Megatron is imported.

    Raises:
        UsageError: if there is a GPU that cannot be used.
    """
    cpu_backend.choose()
    log_filters.install()


def check() -> None:
    """Check that this process knows its rank, and has a GPU. A process started alone is rank 0 of 1.

    Raises:
        UsageError: if it does not.
    """
    if not has_rank():
        _refuse_other_launchers()
        _be_the_only_rank()
    if cpu_backend.is_enabled():  # Megatron asks for it with tensor parallelism, as of older GPUs
        os.environ.setdefault("CUDA_DEVICE_MAX_CONNECTIONS", "1")
    gpus, needed = torch.cuda.device_count(), int(os.environ["LOCAL_RANK"]) + 1
    if not cpu_backend.is_enabled() and needed > gpus:
        needed = int(os.environ.get("LOCAL_WORLD_SIZE", needed))
        raise UsageError(
            f"--nproc-per-node {needed}: PyTorch sees {gpus} GPU{'s' * (gpus != 1)} here; accepted: "
            f"--nproc-per-node {gpus}, or {cpu_backend.FLAG}"
        )


def has_rank() -> bool:
    """Whether a launcher has given this process a rank.

    Raises:
        UsageError: if what it has set does not say which, or cannot be: ranks would wait for ever.
    """
    missing = [name for name in _OF_A_RANK if name not in os.environ]
    if len(missing) == len(_OF_A_RANK):
        return False
    if missing:
        raise UsageError(
            f"the environment has no {missing[0]}: the ranks cannot find each other; accepted: "
            f"torchrun --nproc-per-node N, or a launcher that sets {', '.join(_OF_A_RANK)}"
        )
    for name in ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_PORT"):
        if not os.environ[name].isdecimal():
            raise UsageError(
                f"{name}={os.environ[name]} in the environment: accepted is a whole number, as "
                "torchrun sets it"
            )
    rank, ranks = int(os.environ["RANK"]), int(os.environ["WORLD_SIZE"])
    if rank >= ranks:
        raise UsageError(
            f"RANK={rank} in the environment, with WORLD_SIZE={ranks}: accepted is a rank below it"
        )
    return True


def free_port() -> int:
    """A port for the first rank to listen on, on all addresses of this host.

    It is none that a socket is given unasked: those of NCCL and gloo come and go.
    """
    while True:
        port = 20000 + secrets.randbelow(10000)
        with socket.socket() as probe, contextlib.suppress(OSError):
            probe.bind(("", port))
            return port


def _refuse_other_launchers() -> None:
    for name, launcher in _OTHER_LAUNCHERS.items():
        number = os.environ.get(name, "1")
        if number.isdigit() and int(number) > 1:
            raise UsageError(
                f"{launcher} with {number} tasks, and no RANK in the environment: each would train "
                f"alone; accepted: {launcher} of one task a node, which starts torchrun"
            )


def _be_the_only_rank() -> None:
    address = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": str(free_port())}
    os.environ |= {"RANK": "0", "LOCAL_RANK": "0", "WORLD_SIZE": "1", **address}
    print("> one rank; for more: torchrun --nproc-per-node N ...", flush=True)
