"""The command ``scmoe plot-schedule``, from a checkout: see megatron_scmoe/cli/plot_schedule.py."""

from megatron_scmoe.cli.program import run

if __name__ == "__main__":
    run("plot-schedule")
