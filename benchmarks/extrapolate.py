"""What a measured result would be on more GPUs, from its operator times.

    python benchmarks/extrapolate.py benchmarks/results/2xh200-medium-staged.json --gpus 4

With more ranks a larger share of the tokens leaves its GPU: (n - 1) / n. All-to-alls take longer by
that much, at the same bandwidth of each GPU (or --bandwidth times it); compute stays. Stock
sends twice the tokens and waits for all of it; stock + shared expert and serial ScMoE send as many as
ScMoE; of shared-overlap, all that the shared expert's compute can hide is taken to be hidden; what
ScMoE hides is simulated (megatron_scmoe/analysis/simulator.py). The measured time is kept and only the
difference is added. An extrapolation, not a measurement: contention on the host's memory by more GPUs
is left out.
"""

from dataclasses import replace
from pathlib import Path

from result import read_result

from megatron_scmoe.analysis.simulator import OperatorTimes, OperatorTimesError, simulate
from megatron_scmoe.config import DEFAULT_EXPERT_SLOT
from megatron_scmoe.overlap.schedule import build_schedule
from megatron_scmoe.platform.command_line import OneLineParser, UsageError, positive, run_tool

VOLUME = {"top2": 2, "shared": 1, "scmoe-serial": 1}
"""Tokens sent by systems that wait for all of their communication, in those of ScMoE."""

DIRECTIONS = {"forward_ms": (False,), "step_ms": (False, True)}


def added(system: str, key: str, result: dict, times: OperatorTimes, factor: float) -> float | None:
    """Milliseconds that a pair takes longer when all-to-alls take ``factor`` as long."""
    total = 0.0
    for backward in DIRECTIONS[key]:
        now = times.backward if backward else times.forward
        if system in VOLUME:
            total += VOLUME[system] * (factor - 1) * _communication(now)
        elif system == "scmoe":
            slot = (
                result["slot"] if result["slot"] is not None else DEFAULT_EXPERT_SLOT[result["tap"]]
            )
            schedule = build_schedule(result["tap"], slot, True, chunks=result["chunks"])
            longer = {name: now[name] * factor for name in ("dispatch", "combine")}
            then = replace(times, forward=now | longer, backward=now | longer)
            same = replace(times, forward=now, backward=now)
            ends = (max(i.end for i in simulate(schedule, t, backward)) for t in (then, same))
            total += next(ends) - next(ends)
        elif system == "shared-overlap":
            hides = now["shared expert"]
            exposed = (max(0.0, by * _communication(now) - hides) for by in (factor, 1.0))
            total += next(exposed) - next(exposed)
        elif system != "floor":
            return None
    return total


def _communication(times: dict[str, float]) -> float:
    return times["dispatch"] + times["combine"]


def main() -> None:
    """Print measured and extrapolated ratios."""
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("result", type=Path, help="JSON of step_time.py")
    parser.add_argument("--operators", type=Path, metavar="FILE",
        help="operator times of the same shape, if the result has none")  # fmt: skip
    parser.add_argument("--gpus", type=positive, default=4, metavar="N", help="2 or more")
    parser.add_argument("--bandwidth", type=float, default=1.0, metavar="RATIO",
        help="of each GPU's link then, over that measured")  # fmt: skip
    options = parser.parse_args()
    result = read_result(options.result)
    _check_measured(options.result, result)
    if options.gpus < 2:
        raise UsageError("--gpus 1: nothing leaves one GPU; accepted: 2 or more")
    if options.bandwidth <= 0:
        raise UsageError(f"--bandwidth {options.bandwidth}: accepted: above 0")
    try:
        times = OperatorTimes.read(options.operators or options.result)
    except OperatorTimesError as error:
        raise UsageError(
            f"{error}; accepted: --operators FILE, or a result with --operators"
        ) from error
    measured_on = result["world_size"]
    factor = (1 - 1 / options.gpus) / (1 - 1 / measured_on) / options.bandwidth
    pairs = result["sizes"]["blocks"] // (1 if result["sizes"]["every_block"] else 2)
    print(
        f"{result['shape']}, {result['link']}: measured on {measured_on} GPUs, for {options.gpus}:"
    )
    found: dict[str, dict[str, float]] = {}
    for system, row in result["systems"].items():
        for key in DIRECTIONS:
            more = added(system, key, result, times, factor)
            if more is not None:
                found.setdefault(system, {})[key] = row[key] + pairs * more
    print(f"{'system':<16}{'step ms':>10}{'over top2':>11}{'forward ms':>12}{'over top2':>11}")
    for system, row in found.items():
        step, forward = (found["top2"][key] / row[key] for key in ("step_ms", "forward_ms"))
        print(
            f"{system:<16}{row['step_ms']:>10.1f}{step:>10.3f}x"
            f"{row['forward_ms']:>12.1f}{forward:>10.3f}x"
        )


def _check_measured(path: Path, result: dict) -> None:
    """Raise UsageError if nothing can be said of a result."""
    ranks = result["world_size"]
    if ranks < 2:
        raise UsageError(
            f"{path}: measured on {ranks} GPU, where nothing leaves it; accepted: 2 or more"
        )
    if "top2" not in result["systems"]:
        raise UsageError(f"{path}: top2 was not measured; accepted: a result with it")


if __name__ == "__main__":
    run_tool(main)
