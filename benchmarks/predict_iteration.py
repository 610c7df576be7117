"""Predict a whole training iteration of ScMoE and of stock, from operator times of ScMoE.

    python benchmarks/predict_iteration.py --times benchmarks/results/2xh200-wide-operator-times.json \\
      --slot 2 --pairs 3 --micro-batches 4 --gather 4.1 --reduction 9.3 --edge-gather 2.8 \\
      --edge-reduction 5.6 --rest 5.8 --optimizer 10

Transfers are given as they take with the link alone; beside each other they share it. ``--ranks``
says what they take on more ranks: (n - 1) / n of what is sent leaves its rank. Stock top-2 is taken to
be serial ScMoE that sends twice the tokens; its second expert costs what the shared expert does. Not
known here: that a GPU's clock falls as it works more, kernels beside NCCL's, the host.
"""

import argparse
from dataclasses import replace
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

TRANSFERS = ("gather", "reduction", "edge_gather", "edge_reduction")


STOCK = {"permute": 2, "unpermute": 2, "dispatch": 2, "combine": 2}
"""What top-2 takes of each operator, in that of serial ScMoE."""


def main() -> None:
    """Print the table."""
    options = _parse()
    longer = (1 - 1 / options.ranks) / (1 - 1 / options.measured_ranks) / options.bandwidth
    times = scaled(OperatorTimes.read(options.times), {"dispatch": longer, "combine": longer})
    surroundings = {
        name: getattr(options, name) * (longer if name in TRANSFERS else 1) for name in SURROUNDINGS
    }
    around = Iteration(pairs=options.pairs, micro_batches=options.micro_batches, **surroundings)
    systems = {
        "top2": (False, scaled(times, STOCK)),
        "serial": (False, times),
        "overlapped": (True, times),
    }
    found = {
        name: simulate_iteration(build_schedule(options.tap, options.slot, overlap), its, around)
        for name, (overlap, its) in systems.items()
    }
    heads = "".join(f"{f'{name} exposed':>22}" for name in STREAMS)
    print(f"{'':<12}{'ms':>9}{'over top2':>11}{heads}")
    for name, row in found.items():
        over = f"{found['top2'].total / row.total:.3f}x"
        exposed = "".join(f"{row.exposed[stream]:>22.1f}" for stream in STREAMS)
        print(f"{name:<12}{row.total:>9.1f}{over:>11}{exposed}")


def scaled(times: OperatorTimes, factors: dict[str, float]) -> OperatorTimes:
    """Operators that take ``factors`` times as long, by name, in both directions."""

    def of(direction: dict[str, float]) -> dict[str, float]:
        return {name: ms * factors.get(name, 1) for name, ms in direction.items()}

    return replace(times, forward=of(times.forward), backward=of(times.backward))


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
    parser.add_argument("--measured-ranks", type=positive, default=2, metavar="N",
        help="on which the times were measured; default: 2")  # fmt: skip
    parser.add_argument("--ranks", type=positive, metavar="N", help="default: as measured")
    parser.add_argument("--bandwidth", type=float, default=1.0, metavar="RATIO",
        help="of each rank's link on them, over that measured; default: 1")  # fmt: skip
    options = parser.parse_args()
    options.ranks = options.ranks or options.measured_ranks
    for flag in ("measured_ranks", "ranks"):
        if getattr(options, flag) < 2:
            raise UsageError(
                f"--{flag.replace('_', '-')} 1: nothing leaves it; accepted: 2 or more"
            )
    if not 0 < options.bandwidth < float("inf"):
        raise UsageError(f"--bandwidth {options.bandwidth}: accepted: above 0")
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
