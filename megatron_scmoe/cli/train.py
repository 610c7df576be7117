"""Pretrain a ScMoE GPT: Megatron's flags and ``--scmoe-*``; see ``--help`` and README.md.

Run it under torchrun. Without a GPU it trains on the CPU over gloo.
"""

import sys
from pathlib import Path

from megatron_scmoe.cli import program
from megatron_scmoe.platform import launch, megatron_flags
from megatron_scmoe.platform.command_line import asks_for_help


def main() -> None:
    """Show the flags, or train. Raises ScMoEError for what cannot be done."""
    if asks_for_help():
        script = Path(sys.argv[0]).name
        started = script if script.endswith(".py") else "-m megatron_scmoe.cli train"
        megatron_flags.show_help(started, __doc__)
        return
    launch.before_megatron()
    from megatron_scmoe.training.pretrain import main as train

    train()


if __name__ == "__main__":
    program.main(["train", *sys.argv[1:]])
