"""Pretrain a ScMoE GPT: Megatron's flags and ``--scmoe-*``; see ``--help`` and README.md.

Run it under torchrun. Without a GPU it trains on the CPU over gloo.
"""

from megatron_scmoe import cpu

if __name__ == "__main__":
    cpu.enable_if_no_gpu()  # before anything of Megatron is imported
    from megatron_scmoe.training import main

    main()
