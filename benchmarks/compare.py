"""A new result against a stored one: has a system lost speed?

    benchmarks/two_hosts.sh --rate 400mbit -- benchmarks/step_time.py --shape cpu \\
      --rounds 9 --warmup 2 --train-micro-batches 4 --json new.json
    python benchmarks/compare.py new.json benchmarks/results/cpu-2hosts-400mbit.json

Times depend on the machine, so none are compared. What is compared is how many times as fast as the
baseline of the same run each system is (stock top-2, else the first). Systems and times that only one
of the two has are left out. Exit status 1, with one line for each system that has lost more than the
tolerance; 2 where the two were not measured with the same settings.
"""

import argparse
import sys
from collections.abc import Iterator
from pathlib import Path

from result import baseline, measured_keys, read_result, speed

from megatron_scmoe.platform.command_line import OneLineParser, UsageError, run_tool

SETTINGS = (
    "shape", "sizes", "tap", "slot", "chunks", "exchange", "copied", "ep_channels",
    "ep_high_priority", "train_micro_batches", "device", "world_size", "link",
)  # fmt: skip
"""What has to be the same."""

TOLERANCE = 0.1
"""Two stored runs of one benchmark on one machine differ by up to 6% in a ratio of step or forward."""


def main() -> None:
    """Compare, and say what is slower."""
    parser = OneLineParser(description=__doc__.split("\n")[0])
    parser.add_argument("new", type=Path, help="JSON of step_time.py")
    parser.add_argument("stored", type=Path, help="the JSON it is compared with")
    parser.add_argument("--tolerance", type=_fraction, default=TOLERANCE, metavar="FRACTION",
        help="of its ratio that a system may lose")  # fmt: skip
    options = parser.parse_args()
    new, stored = read_result(options.new), read_result(options.stored)
    check_comparable(options.new, new, options.stored, stored)
    lost = list(losses(new, stored, options.tolerance))
    for line in lost:
        print(line)
    if lost:
        sys.exit(1)
    compared = ", ".join(name for name in stored["systems"] if name in new["systems"])
    print(f"none of {compared} has lost more than {options.tolerance:.1%}")


def losses(new: dict, stored: dict, tolerance: float) -> Iterator[str]:
    """One line for each system that has lost more than the tolerance of one of its ratios."""
    base = baseline(stored["systems"])
    for system in stored["systems"]:
        found = []
        for key in measured_keys(stored["systems"]):
            now, before = (speed(result["systems"], system, base, key) for result in (new, stored))
            if now is not None and before is not None and now < before * (1 - tolerance):
                name = key.removesuffix("_ms")
                found.append(f"{name} {now:.3f}x, stored {before:.3f}x ({now / before - 1:.1%})")
        if found:
            yield f"{system} over {base}: {'; '.join(found)}; accepted: -{tolerance:.1%}"


def check_comparable(new_path: Path, new: dict, stored_path: Path, stored: dict) -> None:
    """Raise UsageError, which names the setting, if two results cannot be compared."""
    for name in SETTINGS:
        if new[name] != stored[name]:
            given, accepted = new[name], stored[name]
            if name == "sizes":
                name = next(size for size in accepted if given.get(size) != accepted[size])
                given, accepted = given.get(name), accepted[name]
            raise UsageError(
                f"{new_path}: {name} is {given!r}; accepted: {accepted!r}, as in {stored_path}"
            )
    base = baseline(stored["systems"])
    if base not in new["systems"] or len(new["systems"].keys() & stored["systems"].keys()) < 2:
        raise UsageError(
            f"{new_path}: systems {', '.join(new['systems'])}; accepted: {base} and another of "
            f"{', '.join(stored['systems'])}"
        )


def _fraction(text: str) -> float:
    try:
        value = float(text)
    except ValueError:
        value = -1.0
    if not 0 <= value < 1:
        raise argparse.ArgumentTypeError(f"{text}: accepted are numbers from 0 to below 1")
    return value


if __name__ == "__main__":
    run_tool(main)
