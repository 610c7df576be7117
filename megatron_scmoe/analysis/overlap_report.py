"""Whether an iteration overlapped: figures from the times of its exchanges, the line, and advice."""

import math
import statistics
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from megatron_scmoe.analysis.profiler_trace import merged
from megatron_scmoe.overlap.exchange_times import ExchangeTimes

LATE_MS = 0.1
"""A host that is less ahead of the GPU than this is late: the GPU has run out of work."""

LITTLE_HIDDEN = 0.5
"""Of the all-to-all time: an overlap that hides less is worth a line ..."""

MUCH_EXPOSED = 0.05
"""... if the compute waits for more than this share of forward and backward."""

UNKNOWN = math.nan


class RankFigures(NamedTuple):
    """What one iteration of one rank shows; not a number where it cannot be known."""

    span_ms: float
    """Of forward and backward: from the begin of the iteration to its last arrival."""
    forward_ms: float
    backward_ms: float
    """While all-to-alls were under way; two at a time count once."""
    exposed_forward_ms: float
    exposed_backward_ms: float
    """While the compute waited for one."""
    lead_ms: float
    """How far the host was ahead of the GPU where it issued a wait; the median."""
    late_share: float
    """The share of waits where it was ahead by less than LATE_MS."""
    gate: float = UNKNOWN
    """The mean weight of the shared expert."""
    zero_share: float = UNKNOWN
    """The share of zero experts among the experts chosen."""


def rank_figures(times: Sequence[ExchangeTimes], host_runs_ahead: bool) -> RankFigures:
    """The figures of the exchanges of one iteration.

    Args:
        times: of each, from the begin of the iteration.
        host_runs_ahead: of the device; on the CPU there is nothing to be ahead of.
    """
    ways = [[t for t in times if t.is_backward == is_backward] for is_backward in (False, True)]
    exposed = [sum(map(stall, way)) for way in ways]
    under_way = [
        covered((t.begun, t.done) for t in way)  # type: ignore[misc]  # done is known
        if all(t.done is not None for t in way)
        else UNKNOWN
        for way in ways
    ]
    leads = [t.lead for t in times] if host_runs_ahead else []
    forward, backward = under_way
    exposed_forward, exposed_backward = exposed
    return RankFigures(
        span_ms=max((t.resumed for t in times), default=0.0),
        forward_ms=forward,
        backward_ms=backward,
        exposed_forward_ms=exposed_forward,
        exposed_backward_ms=exposed_backward,
        lead_ms=statistics.median(leads) if leads else UNKNOWN,
        late_share=sum(lead < LATE_MS for lead in leads) / len(leads) if leads else UNKNOWN,
    )


def stall(times: ExchangeTimes) -> float:
    """How long the compute waited for the exchange; not for a host that was slow meanwhile; ms."""
    until = times.resumed if times.done is None else min(times.resumed, times.done)
    return max(0.0, until - times.reached)


def covered(spans: Iterable[tuple[float, float]]) -> float:
    """The length of the union of spans (begin, end)."""
    return sum(end - begin for begin, end in merged(spans))


@dataclass(frozen=True)
class OverlapReport:
    """One iteration of several ranks.

    Args:
        ranks: what each of them shows.
        overlap: whether launches and waits are apart in its schedule.
        load: tokens of the busiest expert over the mean of its layer, and the number of that layer:
            of the layer where this is largest. None without such layers.
    """

    ranks: list[RankFigures]
    overlap: bool
    load: tuple[float, int] | None = None

    @property
    def span_ms(self) -> float:
        """Of forward and backward, the mean of the ranks, as in what follows."""
        return self._mean("span_ms")

    @property
    def all_to_all_ms(self) -> float:
        """During which all-to-alls were under way."""
        return self._mean("forward_ms") + self._mean("backward_ms")

    @property
    def exposed_ms(self) -> float:
        """During which the compute waited for one."""
        return self._mean("exposed_forward_ms") + self._mean("exposed_backward_ms")

    @property
    def exposed_share(self) -> float:
        """Of forward and backward."""
        return self.exposed_ms / self.span_ms if self.span_ms else 0.0

    @property
    def hidden_share(self) -> float:
        """Of the all-to-all time, 0 to 1; without overlap 0, as nothing is computed meanwhile."""
        if not self.overlap:
            return 0.0
        if not self.all_to_all_ms > 0:  # none, or not a number
            return UNKNOWN
        return min(1.0, max(0.0, 1 - self.exposed_ms / self.all_to_all_ms))

    def scalars(self) -> dict[str, float]:
        """What TensorBoard and W&B get, by name; what is not known is left out."""
        worst = max((r.exposed_forward_ms + r.exposed_backward_ms for r in self.ranks), default=0.0)
        found = {
            "hidden-share": self.hidden_share,
            "all-to-all-ms": self.all_to_all_ms,
            "exposed-ms": self.exposed_ms,
            "exposed-forward-ms": self._mean("exposed_forward_ms"),
            "exposed-backward-ms": self._mean("exposed_backward_ms"),
            "exposed-ms-max": worst,
            "exposed-share": self.exposed_share,
            "host-lead-ms": self._mean("lead_ms"),
            "host-late-share": self._mean("late_share"),
            "tokens-per-expert-max-over-mean": self.load[0] if self.load else UNKNOWN,
            "gate": self._mean("gate"),
            "zero-expert-share": self._mean("zero_share"),
        }
        return {f"scmoe/{name}": value for name, value in found.items() if not math.isnan(value)}

    def line(self, iteration: int) -> str:
        """The line of the log."""
        known = {name.removeprefix("scmoe/"): value for name, value in self.scalars().items()}
        parts = [f"overlap of iteration {iteration:8d}"]
        if not self.span_ms:
            parts.append("no all-to-all")
        else:
            hidden, whole = known.get("hidden-share"), known.get("all-to-all-ms")
            serial = "" if self.overlap else " (serial)"
            if hidden is not None and whole is not None:
                parts.append(f"all-to-alls (ms): {whole:.1f}")
                parts.append(f"hidden: {hidden:.1%}{serial}")
            else:
                parts.append(f"hidden: not known with CUDA_DEVICE_MAX_CONNECTIONS=1{serial}")
            parts.append(
                f"exposed (ms): {known['exposed-ms']:.1f}, forward "
                f"{known['exposed-forward-ms']:.1f}, backward {known['exposed-backward-ms']:.1f}, "
                f"most on a rank {known['exposed-ms-max']:.1f}"
            )
            parts.append(f"exposed of forward and backward: {known['exposed-share']:.1%}")
        if "host-lead-ms" in known:
            late = known["host-late-share"]
            parts.append(
                f"host lead (ms): {known['host-lead-ms']:.2f}, late at {late:.0%} of waits"
            )
        if self.load is not None:
            parts.append(f"tokens per expert, max/mean: {self.load[0]:.2f} (layer {self.load[1]})")
        if "gate" in known:
            parts.append(f"gate: {known['gate']:.3f}")
        if "zero-expert-share" in known:
            parts.append(f"zero experts: {known['zero-expert-share']:.1%}")
        return f" {' | '.join(parts)} |"

    @property
    def is_late(self) -> bool:
        """Whether the host is the limit: at half of the waits the GPU had run out of work."""
        return self._mean("lead_ms") < LATE_MS

    @property
    def is_exposed(self) -> bool:
        """Whether much of the time goes into waits, and little is known to be hidden."""
        return self.exposed_share > MUCH_EXPOSED and not self.hidden_share >= LITTLE_HIDDEN

    def _mean(self, name: str) -> float:
        values = [getattr(rank, name) for rank in self.ranks]
        return statistics.fmean(values) if values else UNKNOWN
