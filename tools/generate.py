"""The command ``scmoe generate``, from a checkout: see megatron_scmoe/cli/generate.py."""

from megatron_scmoe.cli.program import run

if __name__ == "__main__":
    run("generate")
