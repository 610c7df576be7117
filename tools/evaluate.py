"""The command ``scmoe evaluate``, from a checkout: see megatron_scmoe/cli/evaluate.py."""

from megatron_scmoe.cli.program import run

if __name__ == "__main__":
    run("evaluate")
