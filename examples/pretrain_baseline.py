"""Pretrain Megatron's own model by Megatron's loop, with ScMoE's data: BASELINE of a recipe.

It takes Megatron's flags and none of ScMoE's. A recipe's train.sh starts it; by hand, under torchrun:

    torchrun --nproc-per-node 8 examples/pretrain_baseline.py ...
"""

import sys
from pathlib import Path

sys.path.insert(0, str(Path(__file__).resolve().parents[1]))  # where the package is not installed


def main() -> None:
    """Show the flags, or train."""
    from megatron_scmoe.platform import launch, megatron_flags
    from megatron_scmoe.platform.command_line import asks_for_help

    if asks_for_help():
        megatron_flags.show_help(Path(sys.argv[0]).name, __doc__, own=None)
        return
    launch.before_megatron()
    from megatron_scmoe.training.stock import main as train

    train()


if __name__ == "__main__":
    main()
