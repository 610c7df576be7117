"""Predict a whole training iteration, overlapped and not, from operator times.

    python benchmarks/predict_iteration.py --times benchmarks/results/2xh200-wide-operator-times.json \\
      --slot 2 --pairs 3 --micro-batches 4 --gather 4.1 --reduction 9.3 --edge-gather 2.8 \\
      --edge-reduction 5.6 --rest 5.8 --optimizer 10

Transfers are given as they take with the link alone; beside each other they share it.
"""

import argparse
from pathlib import Path

from megatron_scmoe.analysis.iteration_simulator import STREAMS, Iteration, simulate_iteration
from megatron_scmoe.analysis.simulator import OperatorTimes
from megatron_scmoe.config import DEFAULT_EXPERT_SLOT
from megatron_scmoe.overlap.schedule import TAP_BOUNDARY, build_schedule, num_slots
from megatron_scmoe.platform.command_line import OneLineParser, UsageError, positive, run_tool

SURROUNDINGS = {
    "gather": "all-gather of the parameters of one pair",
    "reduction": "reduce-scatter of the gradients of one pair",
    "edge_gather": "all-gather of the embedding",
    "edge_reduction": "reduce-scatter of the embedding's gradients",
    "rest": "compute of a micro-batch outside the pairs",
    "optimizer": "the optimizer's step",
}
"""All in milliseconds."""


def main() -> None:
    """Print the table."""
    options = _parse()
    times = OperatorTimes.read(options.times)
    surroundings = {name: getattr(options, name) for name in SURROUNDINGS}
    around = Iteration(pairs=options.pairs, micro_batches=options.micro_batches, **surroundings)
    print(f"{'':<12}{'ms':>9}" + "".join(f"{f'{name} exposed':>22}" for name in STREAMS))
    for name, overlap in (("serial", False), ("overlapped", True)):
        found = simulate_iteration(
            build_schedule(options.tap, options.slot, overlap), times, around
        )
        exposed = "".join(f"{found.exposed[stream]:>22.1f}" for stream in STREAMS)
        print(f"{name:<12}{found.total:>9.1f}{exposed}")


def _parse() -> argparse.Namespace:
    parser = OneLineParser(description="Predict a whole training iteration from operator times.")
    parser.add_argument("--times", type=Path, required=True, metavar="FILE",
        help="operator times (--scmoe-operator-times, or a result of step_time.py)")  # fmt: skip
    parser.add_argument("--tap", choices=TAP_BOUNDARY, default="pos2", help="default: pos2")
    parser.add_argument("--slot", type=int, metavar="N", help="default: the tap's")
    parser.add_argument("--pairs", type=positive, required=True, metavar="N", help="on a rank")
    parser.add_argument("--micro-batches", type=positive, required=True, metavar="N",
        help="of an iteration")  # fmt: skip
    for name, what in SURROUNDINGS.items():
        flag = f"--{name.replace('_', '-')}"
        parser.add_argument(flag, type=float, default=0.0, metavar="MS", help=f"{what}; default: 0")
    options = parser.parse_args()
    if options.slot is None:
        options.slot = DEFAULT_EXPERT_SLOT[options.tap]
    last = num_slots(options.tap) - 1
    if not 0 <= options.slot <= last:
        raise UsageError(
            f"--slot {options.slot}: with --tap {options.tap} accepted are 0 to {last}"
        )
    for name in SURROUNDINGS:
        if not 0 <= getattr(options, name) < float("inf"):
            raise UsageError(
                f"--{name.replace('_', '-')} {getattr(options, name)}: accepted: milliseconds"
            )
    return options


if __name__ == "__main__":
    run_tool(main)
