"""Draw the two rails of one pair of ScMoE blocks, forward and backward, as SVG or PNG.

    scmoe plot-schedule --times times.json --tap pos2 --slot 1 --output schedule.svg
    scmoe plot-schedule --times times.json --tap pos2 --slot 1 --compare --output two.svg
    scmoe plot-schedule --times times.json --tap pos2 --all-slots --output slots.svg
    scmoe plot-schedule --trace trace.json.gz --output kernels.png

The first three predict, from measured operator times; the last shows the kernels that a profiler
saw (`benchmarks/step_time.py --trace`). A table with the share of the communication that has compute
beside it is printed.
"""

import argparse
import sys
from pathlib import Path

from megatron_scmoe.analysis import schedule_plot
from megatron_scmoe.analysis.profiler_trace import TraceError, find_pairs, read_trace
from megatron_scmoe.analysis.schedule_plot import Panel, share_beside
from megatron_scmoe.analysis.simulator import OperatorTimes, OperatorTimesError
from megatron_scmoe.cli import program
from megatron_scmoe.config import DEFAULT_EXPERT_SLOT, Tap
from megatron_scmoe.overlap.schedule import TAP_BOUNDARY, build_schedule, num_slots
from megatron_scmoe.platform.command_line import (
    OneLineParser,
    UsageError,
    refuse_overwrite,
    staged_outputs,
)

MOST_CHUNKS = 64
"""That a picture shows; with more, drawing takes minutes."""

PREDICTED_ONLY = ("tap", "slot", "all_slots", "compare", "chunks", "overlap")


def main(argv: list[str] | None = None) -> None:
    parser = OneLineParser(description="Draw the rails of one pair of ScMoE blocks.")
    parser.add_argument(
        "--times", type=Path, metavar="FILE",
        help="predict from these operator times (a file written by --scmoe-operator-times)",
    )  # fmt: skip
    parser.add_argument(
        "--trace", type=Path, metavar="FILE",
        help="show the kernels of this torch profiler's trace (.json or .json.gz)",
    )  # fmt: skip
    parser.add_argument(
        "--output", type=Path, required=True, metavar="FILE", help="the figure, .svg or .png"
    )
    parser.add_argument("--force", action="store_true", help="overwrite an existing figure")
    predicted = parser.add_argument_group("with --times")
    predicted.add_argument("--tap", choices=TAP_BOUNDARY, help="the tap (default: pos2)")
    predicted.add_argument(
        "--slot", type=int, metavar="N",
        help="backbone operators between tap and experts (default: 1, with pos3 2)",
    )  # fmt: skip
    predicted.add_argument(
        "--all-slots", action="store_true", default=None, help="every slot, the fastest first"
    )
    predicted.add_argument(
        "--compare", action="store_true", default=None,
        help="the same slot twice: all-to-alls waited for at once, and beside compute",
    )  # fmt: skip
    predicted.add_argument(
        "--chunks", type=int, metavar="N", help="chunks of the routed tokens (default: 1)"
    )
    predicted.add_argument(
        "--overlap", action=argparse.BooleanOptionalAction,
        help="all-to-alls beside compute, or each waited for at once (default: beside)",
    )  # fmt: skip
    traced = parser.add_argument_group("with --trace")
    traced.add_argument(
        "--pair", type=int, metavar="N", help="the pair shown, from 1 (default: a middle one)"
    )
    args = parser.parse_args(argv)

    _check(args)
    refuse_overwrite("--output", [args.output], args.force)
    figure, table = _predict(args) if args.times else _show_trace(args)
    with staged_outputs("--output", [args.output]) as (staged,):
        schedule_plot.save(figure, staged)
    print(table)
    print(f"wrote {args.output}")


def _check(args) -> None:
    if args.output.suffix not in schedule_plot.FORMATS:
        raise UsageError(f"--output {args.output}: accepted are names that end in .svg or .png")
    if args.times and args.trace:
        raise UsageError(f"--trace {args.trace}: --times is given as well; accepted is one of them")
    if not args.times and not args.trace:
        raise UsageError(
            "--times: not given; accepted: a file written by --scmoe-operator-times, or --trace "
            "with a torch profiler's trace"
        )
    foreign = PREDICTED_ONLY if args.trace else ("pair",)
    for name in foreign:
        if getattr(args, name) is not None:
            mode = "--times" if args.trace else "--trace"
            raise UsageError(f"--{name.replace('_', '-')}: works with {mode} only; leave it out")
    if args.slot is not None and args.all_slots:
        raise UsageError(f"--slot {args.slot}: --all-slots draws all of them; leave one out")
    if args.compare and (args.all_slots or args.overlap is not None):
        other = "--all-slots" if args.all_slots else "--overlap"
        raise UsageError(f"--compare: draws one slot with and without overlap; leave {other} out")
    if args.chunks is not None and not 1 <= args.chunks <= MOST_CHUNKS:
        raise UsageError(f"--chunks {args.chunks}: accepted is 1 to {MOST_CHUNKS}")


def _predict(args):
    try:
        times = OperatorTimes.read(args.times)
    except OperatorTimesError as error:
        raise UsageError(
            f"--times {error}; accepted: a file written by --scmoe-operator-times"
        ) from error
    tap: Tap = args.tap or "pos2"
    overlap = args.overlap is not False
    slots = range(num_slots(tap)) if args.all_slots else [args.slot]
    if slots == [None]:
        slots = [DEFAULT_EXPERT_SLOT[tap]]
    if not args.all_slots and not 0 <= slots[0] < num_slots(tap):
        raise UsageError(
            f"--slot {slots[0]}: with --tap {tap} accepted are 0 to {num_slots(tap) - 1}"
        )
    chunks = args.chunks or 1

    def panels(slot: int, overlap: bool) -> tuple[Panel, Panel]:
        schedule = build_schedule(tap, slot, overlap, chunks=chunks)
        return schedule_plot.simulated_panels(schedule, times)

    split = f"{chunks} chunk{'s'[: chunks > 1]}"
    if args.compare:
        what = f"Pos-{tap[-1]}, slot {slots[0]}, {split}"
        found = {"serial": panels(slots[0], False), "overlapped": panels(slots[0], True)}
    else:
        what = f"Pos-{tap[-1]}, {'overlapped' if overlap else 'serial'}, {split}"
        found = {f"slot {slot}": panels(slot, overlap) for slot in slots}
    if args.all_slots:
        best, *others = sorted(found, key=lambda name: sum(panel.length for panel in found[name]))
        found = {f"{best} (best)": found[best], **{name: found[name] for name in others}}
    titles = [f"{name}: {_summary(pair)}" for name, pair in found.items()]
    if len(found) > 1:
        figure = schedule_plot.draw(list(found.values()), f"{what}: predicted", titles)
    else:
        figure = schedule_plot.draw(list(found.values()), f"{what}, {titles[0]}, predicted")
    lines = [_line(name, *pair) for name, pair in found.items()]
    return figure, "\n".join([f"{what}, predicted from {args.times}", _HEAD, *lines])


def _show_trace(args):
    try:
        pairs = find_pairs(read_trace(args.trace), args.trace)
    except TraceError as error:
        raise UsageError(f"--trace {error}") from error
    number = len(pairs) // 2 + 1 if args.pair is None else args.pair
    if not 1 <= number <= len(pairs):
        raise UsageError(f"--pair {number}: {args.trace} has the pairs 1 to {len(pairs)}")
    panels = schedule_plot.traced_panels(pairs[number - 1])
    what = f"{args.trace.name}, pair {number} of {len(pairs)}"
    figure = schedule_plot.draw([[panel] for panel in panels], f"{what}: {_summary(panels)}")
    lines = [_line(panel.title, panel) for panel in panels]
    return figure, "\n".join([what, _HEAD, *lines, _line("both", *panels)])


def _summary(panels: tuple[Panel, Panel]) -> str:
    forward, backward = (panel.length for panel in panels)
    return (
        f"{forward + backward:.2f} ms (forward {forward:.2f}, backward {backward:.2f}), "
        f"{share_beside(panels):.0%} of the all-to-all time beside compute"
    )


_HEAD = f"{'':<16}{'ms':>9}{'all-to-all ms':>15}{'beside compute':>16}{'share':>8}"


def _line(name: str, *panels: Panel) -> str:
    length, sent, beside = (
        sum(getattr(panel, key) for panel in panels)
        for key in ("length", "communication", "beside")
    )
    return f"{name:<16}{length:>9.3f}{sent:>15.3f}{beside:>16.3f}{share_beside(panels):>8.3f}"


if __name__ == "__main__":
    program.main(["plot-schedule", *sys.argv[1:]])
