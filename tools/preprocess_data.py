"""The command ``scmoe preprocess-data``, from a checkout: see megatron_scmoe/cli/preprocess_data.py."""

from megatron_scmoe.cli.program import run

if __name__ == "__main__":
    run("preprocess-data")
