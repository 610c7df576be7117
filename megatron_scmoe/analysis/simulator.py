"""What a schedule costs: two rails simulated from measured operator times.

    block time(slot) = gate + encode + max(dispatch, backbone before) + experts
                       + max(combine, backbone after) + decode

(ICML 2025, section 3.2) is what this gives for one chunk; backward is the forward mirrored.
"""

import json
from dataclasses import asdict, dataclass, field
from pathlib import Path

from megatron_scmoe.errors import ScMoEError
from megatron_scmoe.overlap.schedule import BACKBONE_OPERATORS, Action, Schedule, Step
from megatron_scmoe.platform.atomic_write import atomic_write

ROUTED_OPERATORS = ("route", "permute", "dispatch", "experts", "combine", "unpermute")
OPERATORS = (*BACKBONE_OPERATORS, *ROUTED_OPERATORS)

COMPUTE, COMMUNICATION = "compute", "communication"

LAUNCHED = {Step.LAUNCH_DISPATCH: "dispatch", Step.LAUNCH_COMBINE: "combine"}
WAITED = {Step.WAIT_DISPATCH: "dispatch", Step.WAIT_COMBINE: "combine"}
"""The all-to-all that a step launches, and the one that it waits for."""


class OperatorTimesError(ScMoEError, ValueError):
    """A file that holds no operator times; the message names the file and the fault."""


@dataclass(frozen=True)
class OperatorTimes:
    """Milliseconds of each operator (see ``OPERATORS``) of one pair of blocks, for all tokens.

    An operator which a model has not (a dense MLP, a shared expert) takes no time.
    ``measured_on`` holds the sizes that the times depend on, by name; empty if nobody said.
    """

    forward: dict[str, float]
    backward: dict[str, float]
    measured_on: dict[str, int] = field(default_factory=dict)

    def write(self, path: str | Path) -> None:
        """Write as JSON; the file appears when it is whole."""
        with atomic_write(Path(path)) as (file,):
            file.write_text(json.dumps(asdict(self), indent=1) + "\n")

    @classmethod
    def read(cls, path: str | Path) -> "OperatorTimes":
        """Read what :meth:`write` wrote, or a result of benchmarks/step_time.py that holds it.

        Raises:
            OperatorTimesError: if the file holds anything else; the message names file and fault.
        """
        try:
            found = json.loads(Path(path).read_text())
        except OSError as error:
            raise OperatorTimesError(f"{path}: {error.strerror}") from None
        except ValueError as error:
            raise OperatorTimesError(f"{path}: {error}") from None
        if isinstance(found, dict) and "systems" in found:
            found = found.get("operators")
        for direction in ("forward", "backward"):
            times = found.get(direction) if isinstance(found, dict) else None
            if not isinstance(times, dict):
                raise OperatorTimesError(f"{path}: no object '{direction}' with operator times")
            for name in OPERATORS:
                value = times.get(name)
                if not isinstance(value, int | float) or not 0 <= value < float("inf"):
                    raise OperatorTimesError(
                        f"{path}: {direction} '{name}' is {value!r}, not milliseconds"
                    )
        forward, backward = (
            {n: float(found[d][n]) for n in OPERATORS} for d in ("forward", "backward")
        )
        return cls(forward, backward, found.get("measured_on", {}))


@dataclass(frozen=True)
class Interval:
    """An operator on a rail, in milliseconds from the pair's begin (in backward: its own begin)."""

    rail: str
    name: str
    begin: float
    end: float


def simulate(schedule: Schedule, times: OperatorTimes, backward: bool = False) -> list[Interval]:
    """The operators of one pair, forward or backward, on the compute and the communication rail.

    Each rail works in the order of issue. A transfer begins when its tokens are ready and those
    before it are through; compute that waits for it begins when it has ended.
    """
    durations = times.backward if backward else times.forward
    now = link_free = 0.0
    ready: dict[int, float] = {}
    arrived: dict[tuple[str, int], float] = {}
    intervals = []
    for action in issued(schedule, backward):
        name, step, chunk = parts(action)
        label = schedule.label(action)
        if step in LAUNCHED:
            name = LAUNCHED[step]
            # The dispatch may be launched later than its tokens were ready (see build_schedule).
            begin = max(ready.pop(chunk, now), link_free)
            link_free = begin + durations[name] / schedule.chunks
            arrived[name, chunk] = link_free
            intervals.append(
                Interval(COMMUNICATION, label.removeprefix("launch "), begin, link_free)
            )
        elif step in WAITED:
            now = max(now, arrived[WAITED[step], chunk])
        else:
            share = schedule.chunks if step is not None and step is not Step.ROUTE else 1
            end = now + durations[name] / share
            intervals.append(Interval(COMPUTE, label, now, end))
            now = end
            if step is Step.PERMUTE:
                ready[chunk] = end
    return intervals


def block_time(schedule: Schedule, times: OperatorTimes) -> float:
    """Milliseconds of one pair, forward and backward, as :func:`simulate` predicts."""
    return sum(
        max(interval.end for interval in simulate(schedule, times, backward))
        for backward in (False, True)
    )


def issued(schedule: Schedule, backward: bool) -> list[Action | str]:
    """What is issued, in order; in backward mirrored, launch for wait and wait for launch."""
    sequence = schedule.sequence()
    if not backward:
        return sequence
    mirrored: list[Action | str] = []
    for action in reversed(sequence):
        if isinstance(action, str):
            mirrored.append(action)
        elif action.step is Step.PERMUTE:  # the tokens left here, whenever they were launched
            mirrored += [Action(Step.WAIT_DISPATCH, action.chunk), action]
        elif action.step is not Step.LAUNCH_DISPATCH:
            mirrored.append(Action(_MIRROR.get(action.step, action.step), action.chunk))
    return mirrored


_MIRROR = {
    Step.WAIT_DISPATCH: Step.LAUNCH_DISPATCH,
    Step.LAUNCH_COMBINE: Step.WAIT_COMBINE,
    Step.WAIT_COMBINE: Step.LAUNCH_COMBINE,
}


def parts(action: Action | str) -> tuple[str, Step | None, int]:
    """The name of an action or operator, its step (None for the backbone's), and its chunk."""
    if isinstance(action, str):
        return action, None, 0
    return action.step.value, action.step, action.chunk
