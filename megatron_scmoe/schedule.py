"""When the routed path acts, as data.

Two rails run side by side. The *backbone* passes five boundaries; between them lie its operators:

    PAIR_INPUT --Attn_l--> AFTER_ATTENTION --MLP_l--> AFTER_MLP --Attn_l+1--> AFTER_SECOND_ATTENTION
               --shared expert--> AFTER_SHARED_EXPERT

The *routed path* acts when the backbone tells it of a boundary. :func:`build_schedule` computes once,
from tap, slot and overlap, which steps it takes at which boundary.
"""

from dataclasses import dataclass
from enum import Enum, IntEnum

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


@dataclass(frozen=True)
class Schedule:
    """The steps of the routed path at each boundary, in order."""

    tap: Boundary
    slot: Boundary
    steps: dict[Boundary, tuple[Step, ...]]

    def at(self, boundary: Boundary) -> tuple[Step, ...]:
        """The steps to take when the backbone has reached ``boundary``."""
        return self.steps.get(boundary, ())

    def events(self) -> list[str]:
        """Backbone operators and routed steps of one pair, in the order they are issued."""
        events = []
        for boundary in Boundary:
            events += [step.value for step in self.at(boundary)]
            if boundary < len(BACKBONE_OPERATORS):
                events.append(BACKBONE_OPERATORS[boundary])
        return events

    def __str__(self) -> str:
        """One line per boundary, for logs."""
        lines = []
        for boundary in Boundary:
            steps = ", ".join(step.value for step in self.at(boundary)) or "-"
            lines.append(f"  {boundary.name.lower():<24} {steps}")
        return "\n".join(lines)


def build_schedule(tap: Tap, slot: int, overlap: bool, launch_late: bool = False) -> Schedule:
    """The schedule of one pair (scmoe.md section 2; ICML 2025, section 3.2).

    Gate and encode come as early as possible, decode as late as possible. With ``overlap`` the
    dispatch is in flight from the tap to the slot and the combine from the slot to the end;
    without, each wait directly follows its launch.

    Args:
        tap: what the routed path reads.
        slot: number of backbone operators between the tap and the expert compute.
        overlap: whether launches and waits are apart.
        launch_late: whether the host issues one backbone operator before it launches the dispatch.
            The launch needs split sizes that the GPU computes: so it always has work while the
            host waits for them. The exchange itself still begins when the tokens are ready.

    Raises:
        ValueError: if the slot is outside the tap's range.
    """
    if not 0 <= slot < num_slots(tap):
        raise ValueError(f"slot {slot} is outside 0 to {num_slots(tap) - 1}, the range of {tap}")
    first = TAP_BOUNDARY[tap]
    middle = Boundary(first + slot)
    last = Boundary.AFTER_SHARED_EXPERT

    steps: dict[Boundary, list[Step]] = {boundary: [] for boundary in Boundary}
    steps[first] += [Step.ROUTE, Step.PERMUTE]
    late = launch_late and overlap and slot > 0
    steps[Boundary(first + 1) if late else first].append(Step.LAUNCH_DISPATCH)
    steps[middle if overlap else first].append(Step.WAIT_DISPATCH)
    steps[middle] += [Step.EXPERTS, Step.LAUNCH_COMBINE]
    steps[last if overlap else middle].append(Step.WAIT_COMBINE)
    steps[last].append(Step.UNPERMUTE)
    return Schedule(first, middle, {b: tuple(s) for b, s in steps.items() if s})
