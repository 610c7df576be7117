"""What commands set up in their process before they work."""

import logging
import signal
import sys
import warnings


def quiet_imports() -> None:
    """Megatron and PyTorch tell on import of what is not installed; map CUDA first, if need be."""
    from megatron_scmoe.platform import cpu_backend  # seconds, which a wrong flag need not wait for

    warnings.simplefilter("ignore")
    logging.disable(logging.WARNING)
    cpu_backend.enable_if_no_gpu()  # before anything of Megatron is imported


def leave_nothing_at_signals() -> None:
    """Let SIGTERM and SIGHUP unwind the program, so that what is half-written is removed."""
    for number in (signal.SIGTERM, signal.SIGHUP):
        signal.signal(number, lambda number, _: sys.exit(128 + number))
