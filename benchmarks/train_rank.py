"""One rank of one whole run, in a process of its own; train_processes.py starts it.

It imports what a run needs and waits for its task, a line of JSON on its standard input:

    {"facts": FILE, "log": FILE, "kind": "scmoe" or "stock", "flags": [...], "environment": {...}}

``scmoe`` runs ``pretrain_gpt_scmoe.py`` as it is; ``stock`` runs Megatron's loop on Megatron's own
model, with the same data and forward step. Into the file of facts goes what the log does not say, or
not exactly.
"""

import json
import os
import runpy
import sys
from pathlib import Path

REPOSITORY = Path(__file__).parents[1]


def main(facts: Path, kind: str) -> None:
    """Train as the flags in ``sys.argv`` say, then write the facts."""
    from megatron_scmoe.platform import launch

    launch.before_megatron()
    found = _Facts()
    if kind == "scmoe":
        sys.argv[0] = str(REPOSITORY / "pretrain_gpt_scmoe.py")
        try:
            runpy.run_path(sys.argv[0], run_name="__main__")
        except SystemExit as end:
            if end.code:
                raise
    else:
        from megatron_scmoe.training import stock

        stock.main()
    facts.write_text(json.dumps(found.collect()))


class _Facts:
    """Listens to what Megatron logs.

    Losses are kept on the device until the run is over, as reading one would stop the host.
    """

    def __init__(self) -> None:
        from megatron.training import training

        self.losses: dict = {}
        self.machine: dict = {}
        self._log = training.training_log
        training.training_log = self._listen

    def _listen(self, losses, totals, learning_rate, iteration, *args, **kwargs):
        if not self.machine:  # while there is a process group
            import machine

            self.machine = machine.describe()
        if "lm loss" in losses:
            self.losses[iteration] = losses["lm loss"].detach().clone()
        return self._log(losses, totals, learning_rate, iteration, *args, **kwargs)

    def collect(self) -> dict:
        """Exact losses as hexadecimal numbers by iteration, peak memory in MiB, the machine."""
        import torch
        from machine import ON_CPU

        return {
            "losses": {n: float(loss).hex() for n, loss in self.losses.items()},
            "peak_memory_mb": None if ON_CPU else torch.cuda.max_memory_allocated() / 2**20,
            "machine": self.machine,
        }


def wait_for_task() -> dict:
    """The task, once there is one; from then on all output goes to its log. Ends if there is none."""
    line = sys.stdin.readline()
    if not line:
        sys.exit()
    task = json.loads(line)
    os.environ.update(task["environment"])
    with open(task["log"], "w") as log:
        for stream in (sys.stdout, sys.stderr):
            stream.flush()
            os.dup2(log.fileno(), stream.fileno())
    return task


if __name__ == "__main__":
    import torch

    from megatron_scmoe.platform.command_line import OneLineParser, run_command

    OneLineParser(description=__doc__.split("\n")[0]).parse_args()
    if torch.cuda.is_available():  # without a GPU, what comes has to be mapped to the CPU first
        import megatron_scmoe.training.pretrain  # noqa: F401  seconds of every run
    task = wait_for_task()
    facts_path = Path(task["facts"])
    sys.argv[1:] = task["flags"]
    if task["kind"] == "scmoe":  # its errors are its own
        main(facts_path, "scmoe")
    else:
        run_command(lambda: main(facts_path, "stock"))
