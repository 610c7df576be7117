"""The command ``scmoe serve``, from a checkout: see megatron_scmoe/cli/serve.py."""

from megatron_scmoe.cli.program import run

if __name__ == "__main__":
    run("serve")
