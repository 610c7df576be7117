"""What a schedule costs: two rails simulated from measured operator times.

    block time(slot) = gate + encode + max(dispatch, backbone before) + experts
                       + max(combine, backbone after) + decode

(ICML 2025, section 3.2) is what this gives for one chunk; backward is the forward mirrored.
"""

import json
from collections.abc import Iterator
from dataclasses import asdict, dataclass, field
from enum import Enum
from pathlib import Path
from typing import NamedTuple

from megatron_scmoe.errors import NOT_JSON, ScMoEError, reason_of
from megatron_scmoe.overlap.schedule import BACKBONE_OPERATORS, Action, Schedule, Step
from megatron_scmoe.platform.atomic_write import atomic_write

ROUTED_OPERATORS = ("route", "permute", "dispatch", "experts", "combine", "unpermute")
OPERATORS = (*BACKBONE_OPERATORS, *ROUTED_OPERATORS)

COMPUTE, COMMUNICATION = "compute", "communication"


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
        except (OSError, *NOT_JSON) as error:
            raise OperatorTimesError(f"{path}: {reason_of(error)}") from None
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


class MoveKind(Enum):
    """What one thing that a pair does means for the clock."""

    COMPUTE = "compute"
    LAUNCH = "launch"
    WAIT = "wait"


class Move(NamedTuple):
    """One thing that a pair does, forward or backward.

    Attributes:
        operator: of ``OPERATORS``; of launches and waits, the all-to-all.
        chunk: of the tokens, from 0.
        label: as the schedule's :meth:`~megatron_scmoe.overlap.schedule.Schedule.label`; of an
            all-to-all without "launch" or "wait".
        ms: what the operator takes for these tokens.
    """

    kind: MoveKind
    operator: str
    chunk: int
    label: str
    ms: float


def moves(schedule: Schedule, times: OperatorTimes, backward: bool) -> Iterator[Move]:
    """What a pair does, in order; in backward mirrored, launch for wait and wait for launch.

    An exchange begins when its tokens are ready, whenever the host launches it: so the dispatch is
    launched directly behind the permutation here (see :func:`build_schedule`).
    """
    durations = times.backward if backward else times.forward
    for action in _mirrored(schedule) if backward else _with_early_launches(schedule):
        if isinstance(action, str):
            yield Move(MoveKind.COMPUTE, action, 0, action, durations[action])
            continue
        step, chunk = action
        kind, operator = _ALL_TO_ALLS.get(step, (MoveKind.COMPUTE, step.value))
        label = schedule.label(action).removeprefix(f"{kind.value} ")
        parts = 1 if step is Step.ROUTE else schedule.chunks
        yield Move(kind, operator, chunk, label, durations[operator] / parts)


def simulate(schedule: Schedule, times: OperatorTimes, backward: bool = False) -> list[Interval]:
    """The operators of one pair, forward or backward, on the compute and the communication rail.

    Each rail works in the order of issue. A transfer begins when its tokens are ready and those
    before it are through; compute that waits for it begins when it has ended.
    """
    now = link_free = 0.0
    arrived: dict[tuple[str, int], float] = {}
    intervals = []
    for move in moves(schedule, times, backward):
        if move.kind is MoveKind.LAUNCH:
            begin = max(now, link_free)
            link_free = arrived[move.operator, move.chunk] = begin + move.ms
            intervals.append(Interval(COMMUNICATION, move.label, begin, link_free))
        elif move.kind is MoveKind.WAIT:
            now = max(now, arrived[move.operator, move.chunk])
        else:
            intervals.append(Interval(COMPUTE, move.label, now, now + move.ms))
            now += move.ms
    return intervals


def block_time(schedule: Schedule, times: OperatorTimes) -> float:
    """Milliseconds of one pair, forward and backward, as :func:`simulate` predicts."""
    return sum(
        max(interval.end for interval in simulate(schedule, times, backward))
        for backward in (False, True)
    )


_ALL_TO_ALLS = {
    Step.LAUNCH_DISPATCH: (MoveKind.LAUNCH, "dispatch"),
    Step.LAUNCH_COMBINE: (MoveKind.LAUNCH, "combine"),
    Step.WAIT_DISPATCH: (MoveKind.WAIT, "dispatch"),
    Step.WAIT_COMBINE: (MoveKind.WAIT, "combine"),
}

_MIRROR = {
    Step.WAIT_DISPATCH: Step.LAUNCH_DISPATCH,
    Step.LAUNCH_COMBINE: Step.WAIT_COMBINE,
    Step.WAIT_COMBINE: Step.LAUNCH_COMBINE,
}


def _with_early_launches(schedule: Schedule) -> Iterator[Action | str]:
    for action in schedule.sequence():
        if isinstance(action, str) or action.step is not Step.LAUNCH_DISPATCH:
            yield action
        if isinstance(action, Action) and action.step is Step.PERMUTE:
            yield Action(Step.LAUNCH_DISPATCH, action.chunk)


def _mirrored(schedule: Schedule) -> Iterator[Action | str]:
    for action in reversed(schedule.sequence()):
        if isinstance(action, str):
            yield action
        elif action.step is Step.PERMUTE:  # the tokens left here, whenever they were launched
            yield Action(Step.WAIT_DISPATCH, action.chunk)
            yield action
        elif action.step is not Step.LAUNCH_DISPATCH:
            yield Action(_MIRROR.get(action.step, action.step), action.chunk)
