"""Pretrain a ScMoE GPT: Megatron's flags and ``--scmoe-*``; see ``--help`` and README.md.

Run it under torchrun. Without a GPU it trains on the CPU over gloo.
"""

from megatron_scmoe.platform import cpu_backend, log_filters, megatron_flags
from megatron_scmoe.platform.command_line import asks_for_help, run_command


def main() -> None:
    """Show the flags, or train. Raises ScMoEError for what cannot be done."""
    if asks_for_help():
        megatron_flags.show_help("pretrain_gpt_scmoe.py", __doc__)
        return
    cpu_backend.choose()  # before anything of Megatron is imported
    log_filters.install()
    from megatron_scmoe.training.pretrain import main as train

    train()


if __name__ == "__main__":
    run_command(main)
