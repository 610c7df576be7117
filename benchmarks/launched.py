"""Whether a launcher has started the ranks: a benchmark measures what they send each other."""

import os
import sys
from pathlib import Path

from megatron_scmoe.platform.command_line import UsageError


def check_launched() -> None:
    """Refuse a process that was started alone.

    Raises:
        UsageError: in one line, which says how this script is started.
    """
    if "RANK" not in os.environ:
        raise UsageError(
            f"started alone; accepted: torchrun --nproc-per-node N benchmarks/"
            f"{Path(sys.argv[0]).name} ..., or benchmarks/two_hosts.sh"
        )
