"""Pretrain a ScMoE GPT from a checkout: the command ``scmoe train`` (megatron_scmoe/cli/train.py)."""

from megatron_scmoe.cli.program import run

if __name__ == "__main__":
    run("train")
