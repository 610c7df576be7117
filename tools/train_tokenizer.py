"""The command ``scmoe train-tokenizer``, from a checkout: see megatron_scmoe/cli/train_tokenizer.py."""

from megatron_scmoe.cli.program import run

if __name__ == "__main__":
    run("train-tokenizer")
