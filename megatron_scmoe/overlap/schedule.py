"""When the routed path acts, as data.

Two rails run side by side. The *backbone* passes five boundaries; between them lie its operators:

    PAIR_INPUT --Attn_l--> AFTER_ATTENTION --MLP_l--> AFTER_MLP --Attn_l+1--> AFTER_SECOND_ATTENTION
               --shared expert--> AFTER_SHARED_EXPERT

The *routed path* acts when the backbone tells it of a boundary. :func:`build_schedule` computes once,
from tap, slot and overlap, which steps it takes at which boundary.
"""

from dataclasses import dataclass, replace
from enum import Enum, IntEnum
from typing import NamedTuple

from megatron_scmoe.config import Tap


class Boundary(IntEnum):
    """What the backbone has reached; the comment gives the paper's name of the tensor there."""

    PAIR_INPUT = 0  # H_{l-1}
    AFTER_ATTENTION = 1  # H_l^MH
    AFTER_MLP = 2  # H_l^MLP; with MoE in every block: the block's own input
    AFTER_SECOND_ATTENTION = 3  # H_{l+1}^MH
    AFTER_SHARED_EXPERT = 4  # SE(H_{l+1}^MH)


class Step(Enum):
    """What the routed path does; the paper's operators, the all-to-alls split in launch and wait."""

    ROUTE = "route"  # gate
    PERMUTE = "permute"  # encode
    LAUNCH_DISPATCH = "launch dispatch"
    WAIT_DISPATCH = "wait dispatch"
    EXPERTS = "experts"
    LAUNCH_COMBINE = "launch combine"
    WAIT_COMBINE = "wait combine"
    UNPERMUTE = "unpermute"  # decode


BACKBONE_OPERATORS = ("attention", "mlp", "second attention", "shared expert")
"""``BACKBONE_OPERATORS[b]`` is computed between boundary b and boundary b + 1."""

TAP_BOUNDARY: dict[Tap, Boundary] = {
    "pos3": Boundary.PAIR_INPUT,
    "pos2": Boundary.AFTER_ATTENTION,
    "pos1": Boundary.AFTER_MLP,
}


def num_slots(tap: Tap) -> int:
    """How many expert slots a tap has: one more than backbone operators behind it (3, 4, 5)."""
    return Boundary.AFTER_SHARED_EXPERT - TAP_BOUNDARY[tap] + 1


def slot_behind_second_attention(tap: Tap) -> int:
    """The first slot that has the second attention between tap and experts."""
    return Boundary.AFTER_SECOND_ATTENTION - TAP_BOUNDARY[tap]


class Action(NamedTuple):
    """A step taken for one chunk of the tokens; ROUTE is taken once, for all of them."""

    step: Step
    chunk: int = 0


@dataclass(frozen=True)
class Schedule:
    """The actions of the routed path at each boundary, in order."""

    tap: Boundary
    slot: Boundary
    chunks: int
    overlap: bool
    actions: dict[Boundary, tuple[Action, ...]]

    def at(self, boundary: Boundary) -> tuple[Action, ...]:
        """The actions to take when the backbone has reached ``boundary``."""
        return self.actions.get(boundary, ())

    def sequence(self) -> list[Action | str]:
        """Routed actions and backbone operators (by name) of one pair, in the order of issue."""
        sequence: list[Action | str] = []
        for boundary in Boundary:
            sequence += self.at(boundary)
            if boundary < len(BACKBONE_OPERATORS):
                sequence.append(BACKBONE_OPERATORS[boundary])
        return sequence

    def label(self, action: Action | str) -> str:
        """The name of an action or operator; with several chunks "experts 2" is the second's."""
        if isinstance(action, str):
            return action
        several = self.chunks > 1 and action.step is not Step.ROUTE
        return f"{action.step.value} {action.chunk + 1}" if several else action.step.value

    def events(self) -> list[str]:
        """:meth:`sequence` as names."""
        return [self.label(action) for action in self.sequence()]

    def __str__(self) -> str:
        """One line per boundary, for logs."""
        lines = []
        for boundary in Boundary:
            actions = ", ".join(self.label(action) for action in self.at(boundary)) or "-"
            lines.append(f"  {boundary.name.lower():<24} {actions}")
        return "\n".join(lines)


def build_schedule(
    tap: Tap, slot: int, overlap: bool, launch_late: bool = False, chunks: int = 1
) -> Schedule:
    """The schedule of one pair (arXiv 2404.05019, section 3.2).

    Gate and encode come as early as possible, decode as late as possible. With ``overlap`` the
    dispatch is in flight from the tap to the slot and the combine from the slot to the end;
    without, each wait directly follows its launch. With several chunks the dispatches of all are
    in flight at once, and the experts of one compute while the next one's tokens arrive.

    Args:
        tap: what the routed path reads.
        slot: number of backbone operators between the tap and the expert compute.
        overlap: whether launches and waits are apart.
        launch_late: whether the host issues one backbone operator before it launches the dispatch.
            The launch needs split sizes that the GPU computes: so it always has work while the
            host waits for them. The exchange itself still begins when the tokens are ready.
        chunks: how many parts the tokens are split into.

    Raises:
        ValueError: if the slot is outside the tap's range.
    """
    if not 0 <= slot < num_slots(tap):
        raise ValueError(f"slot {slot} is outside 0 to {num_slots(tap) - 1}, the range of {tap}")
    first = TAP_BOUNDARY[tap]
    middle = Boundary(first + slot)
    last = Boundary.AFTER_SHARED_EXPERT
    launch = Boundary(first + 1) if launch_late and overlap and slot > 0 else first

    actions: dict[Boundary, list[Action]] = {boundary: [] for boundary in Boundary}

    def add(boundary: Boundary, steps: list[Step]) -> None:
        for chunk in range(chunks):
            actions[boundary] += [Action(step, chunk) for step in steps]

    actions[first].append(Action(Step.ROUTE))
    if not overlap:
        add(first, [Step.PERMUTE, Step.LAUNCH_DISPATCH, Step.WAIT_DISPATCH])
        add(middle, [Step.EXPERTS, Step.LAUNCH_COMBINE, Step.WAIT_COMBINE])
        add(last, [Step.UNPERMUTE])
    else:
        if launch == first:
            add(first, [Step.PERMUTE, Step.LAUNCH_DISPATCH])
        else:
            add(first, [Step.PERMUTE])
            add(launch, [Step.LAUNCH_DISPATCH])
        add(middle, [Step.WAIT_DISPATCH, Step.EXPERTS, Step.LAUNCH_COMBINE])
        add(last, [Step.WAIT_COMBINE, Step.UNPERMUTE])
    return Schedule(first, middle, chunks, overlap, {b: tuple(a) for b, a in actions.items() if a})


def idle_schedule(schedule: Schedule) -> Schedule:
    """The same tap, slot and chunks without any action: the backbone runs alone."""
    return replace(schedule, actions={})
