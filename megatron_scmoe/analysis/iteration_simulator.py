"""What a whole iteration costs where expert and data-parallel collectives share a link.

All-gathers of parameters start with the iteration (training/parameter_gathers.py), reductions when the
gradients of a pair are complete. Each kind of collective is a stream: its transfers follow each other.
Transfers of different streams that are under way together have an equal share of the link each, as
NCCL's have. Compute is one rail. It waits for the parameters of a pair before that pair's first
forward, for all-to-alls as the schedule says, and for all gradients before the optimizer.
"""

from dataclasses import dataclass, field

from megatron_scmoe.analysis.simulator import MoveKind, OperatorTimes, moves
from megatron_scmoe.overlap.schedule import Schedule

ALL_TO_ALLS, GATHERS, REDUCTIONS = "all-to-alls", "gathers", "reductions"
STREAMS = (ALL_TO_ALLS, GATHERS, REDUCTIONS)


@dataclass(frozen=True, kw_only=True)
class Iteration:
    """What surrounds the pairs. Times are milliseconds, of transfers that have the link alone.

    Attributes:
        pairs: of blocks on this rank.
        micro_batches: of an iteration.
        gather: all-gather of the parameters of one pair.
        reduction: reduce-scatter of the gradients of one pair.
        edge_gather, edge_reduction: the same of what lies before the first pair, the embedding.
        rest: compute of a micro-batch between the pairs' forward and their backward: logits, loss.
        optimizer: the optimizer's step.
    """

    pairs: int
    micro_batches: int
    gather: float = 0.0
    reduction: float = 0.0
    edge_gather: float = 0.0
    edge_reduction: float = 0.0
    rest: float = 0.0
    optimizer: float = 0.0


@dataclass
class IterationTime:
    """An iteration, in milliseconds: all of it, and how long compute waits for each stream."""

    total: float
    exposed: dict[str, float]


def simulate_iteration(
    schedule: Schedule, times: OperatorTimes, iteration: Iteration
) -> IterationTime:
    """The time of an iteration, and what of it is waiting.

    Args:
        times: of one pair's operators; the all-to-alls with the link for themselves.
    """
    link = _Link()
    exposed = dict.fromkeys(STREAMS, 0.0)

    def wait(stream: str, name: object) -> None:
        exposed[stream] += link.wait(name)

    def run_pair(backward: bool, *of: int) -> None:
        for move in moves(schedule, times, backward):
            transfer = (move.operator, move.chunk, backward, *of)
            if move.kind is MoveKind.LAUNCH:
                link.start(ALL_TO_ALLS, transfer, move.ms)
            elif move.kind is MoveKind.WAIT:
                wait(ALL_TO_ALLS, transfer)
            else:
                link.compute(move.ms)

    link.start(GATHERS, "first gather", iteration.edge_gather)
    for pair in range(iteration.pairs):
        link.start(GATHERS, ("gather", pair), iteration.gather)
    wait(GATHERS, "first gather")
    for micro_batch in range(iteration.micro_batches):
        is_first, is_last = micro_batch == 0, micro_batch + 1 == iteration.micro_batches
        for pair in range(iteration.pairs):
            if is_first:
                wait(GATHERS, ("gather", pair))
            run_pair(False, micro_batch, pair)
        link.compute(iteration.rest)
        for pair in reversed(range(iteration.pairs)):
            run_pair(True, micro_batch, pair)
            if is_last:
                link.start(REDUCTIONS, ("reduction", pair), iteration.reduction)
    link.start(REDUCTIONS, "last reduction", iteration.edge_reduction)
    wait(REDUCTIONS, "last reduction")
    link.compute(iteration.optimizer)
    return IterationTime(link.now, exposed)


@dataclass
class _Link:
    """The link, and the clock."""

    now: float = 0.0
    queues: dict[str, list[list]] = field(default_factory=lambda: {name: [] for name in STREAMS})
    done: set = field(default_factory=set)

    def start(self, stream: str, name: object, took: float) -> None:
        """A transfer is ready to leave, behind those of its stream."""
        self.queues[stream].append([name, took])

    def compute(self, took: float) -> None:
        """Time goes by."""
        end = self.now + took
        while self.now < end and self._heads():
            self._advance(end - self.now)
        self.now = end

    def wait(self, name: object) -> float:
        """Let time go by until a transfer has arrived; returns how long that took."""
        begin = self.now
        while name not in self.done:
            self._advance(float("inf"))
        return self.now - begin

    def _heads(self) -> list[list]:
        return [queue[0] for queue in self.queues.values() if queue]

    def _advance(self, limit: float) -> None:
        """Until the next transfer arrives, or for ``limit``."""
        heads = self._heads()
        step = min(limit, min(left for _, left in heads) * len(heads))
        self.now += step
        for queue in self.queues.values():
            if queue:
                queue[0][1] -= step / len(heads)
                if queue[0][1] <= 1e-12:
                    self.done.add(queue.pop(0)[0])
