"""The command ``scmoe convert``, from a checkout: see megatron_scmoe/cli/convert.py."""

from megatron_scmoe.cli.program import run

if __name__ == "__main__":
    run("convert")
