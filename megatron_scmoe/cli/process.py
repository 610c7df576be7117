"""What commands set up in their process before they work."""

import logging
import os
import signal
import sys
import warnings


def quiet_imports() -> None:
    """Megatron and PyTorch tell on import of what is not installed; map CUDA first, if need be."""
    from megatron_scmoe.platform import cpu_backend  # seconds, which a wrong flag need not wait for

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    cpu_backend.enable_if_no_gpu()  # before anything of Megatron is imported


def initialise_ranks() -> bool:
    """Make the process group, torchrun's or one of this process alone; False if there is one.

    Raises:
        UsageError: if the environment has half of what torchrun sets.
    """
    import torch

    from megatron_scmoe.platform import cpu_backend, launch

    if torch.distributed.is_initialized():
        return False
    backend = "gloo" if cpu_backend.is_enabled() else "nccl"
    if launch.has_rank():
        torch.cuda.set_device(int(os.environ["LOCAL_RANK"]))
        torch.distributed.init_process_group(backend)
    else:
        store = torch.distributed.HashStore()  # type: ignore[attr-defined]  # it is documented
        torch.distributed.init_process_group(backend, store=store, rank=0, world_size=1)
    return True


def leave_nothing_at_signals() -> None:
    """Let SIGTERM and SIGHUP unwind the program, so that what is half-written is removed.

    What is ignored stays ignored: nohup has its commands outlive the terminal so.
    """
    for number in (signal.SIGTERM, signal.SIGHUP):
        if signal.getsignal(number) != signal.SIG_IGN:
            signal.signal(number, lambda number, _: sys.exit(128 + number))
