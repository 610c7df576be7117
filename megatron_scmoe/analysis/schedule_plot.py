"""The rails of one pair of ScMoE blocks as a figure: as simulated, or as a profiler saw them.

What is drawn is plain data, a :class:`Panel` for each pass; :func:`draw` makes the figure of it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from itertools import groupby
from pathlib import Path

import matplotlib
from matplotlib.axes import Axes
from matplotlib.colors import to_rgb
from matplotlib.figure import Figure
from matplotlib.patches import Patch

from megatron_scmoe.analysis import profiler_trace
from megatron_scmoe.analysis.simulator import COMMUNICATION, COMPUTE, OperatorTimes, simulate
from megatron_scmoe.overlap.schedule import Schedule

COLOURS = {  # Okabe and Ito's, which colour-blind people tell apart
    "attention": "#56B4E9",
    "dense MLP": "#0072B2",
    "shared expert": "#009E73",
    "gate, encode, decode": "#F0E442",
    "experts": "#CC79A7",
    "dispatch": "#D55E00",
    "combine": "#E69F00",
    profiler_trace.ATTENTION: "#56B4E9",
    profiler_trace.GEMM: "#0072B2",
    profiler_trace.PERMUTATION: "#F0E442",
    profiler_trace.COMMUNICATION: "#D55E00",
    profiler_trace.OTHER: "#999999",
}

FORMATS = (".svg", ".png")

_KIND_OF_OPERATOR = {
    "attention": "attention",
    "mlp": "dense MLP",
    "second attention": "attention",
    "shared expert": "shared expert",
    "route": "gate, encode, decode",
    "permute": "gate, encode, decode",
    "dispatch": "dispatch",
    "experts": "experts",
    "combine": "combine",
    "unpermute": "gate, encode, decode",
}
_KERNEL_LABELS = {profiler_trace.ATTENTION: "attention", profiler_trace.GEMM: "GEMM"}


@dataclass(frozen=True)
class Bar:
    """Something on a rail from begin to end, in ms from its pass's begin."""

    rail: str
    begin: float
    end: float
    kind: str  # of COLOURS
    label: str


@dataclass(frozen=True)
class Panel:
    """One pass of a pair; in backward, dispatch and combine stand for their gradients.

    Attributes:
        title: forward or backward.
        rails: from top to bottom.
        bars: what lies on them.
        length: ms of the whole pass.
        communication: ms of its all-to-alls.
        beside: how much of that has compute beside it, in ms.
    """

    title: str
    rails: tuple[str, ...]
    bars: tuple[Bar, ...]
    length: float
    communication: float
    beside: float


def simulated_panels(schedule: Schedule, times: OperatorTimes) -> tuple[Panel, Panel]:
    """Forward and backward as :func:`~megatron_scmoe.analysis.simulator.simulate` predicts them."""
    panels = []
    for backward in (False, True):
        intervals = simulate(schedule, times, backward)
        exchanges, compute = (
            [(i.begin, i.end) for i in intervals if i.rail == rail]
            for rail in (COMMUNICATION, COMPUTE)
        )
        bars = tuple(
            Bar(i.rail, i.begin, i.end, _KIND_OF_OPERATOR[i.name.rstrip(" 0123456789")], i.name)
            for i in intervals
            if i.end > i.begin  # an operator that the model has not
        )
        panels.append(
            Panel(
                "backward" if backward else "forward",
                (COMPUTE, COMMUNICATION),
                bars,
                max(interval.end for interval in intervals),
                *profiler_trace.time_beside(exchanges, compute),
            )
        )
    return panels[0], panels[1]


def traced_panels(pair: tuple[profiler_trace.Pass, profiler_trace.Pass]) -> tuple[Panel, Panel]:
    """Forward and backward of one pair as the profiler saw them; each stream is a rail."""
    forward, backward = (_traced_panel(*named) for named in zip(("forward", "backward"), pair))
    return forward, backward


def share_beside(panels: Sequence[Panel]) -> float:
    """The share of the communication time with compute beside it; 0 if nothing is sent."""
    total = sum(panel.communication for panel in panels)
    return sum(panel.beside for panel in panels) / total if total else 0.0


def draw(rows: Sequence[Sequence[Panel]], title: str, row_titles: Sequence[str] = ()) -> Figure:
    """A grid of panels, one millisecond equally wide in all of them.

    Args:
        rows: panels from top to bottom, each row as long as the first.
        title: above all.
        row_titles: above the first panel of each row.
    """
    columns = list(zip(*rows))
    lengths = [max(panel.length for panel in column) or 1.0 for column in columns]
    height = sum(0.75 + 0.36 * len(row[0].rails) for row in rows)
    figure = Figure(figsize=(12, 1.1 + height), layout="constrained")
    grid = figure.subplots(
        len(rows),
        len(columns),
        squeeze=False,
        width_ratios=lengths,
        height_ratios=[1 + len(row[0].rails) for row in rows],
    )
    figure.suptitle(title, fontsize=11)
    labels = []
    for number, (row, cells) in enumerate(zip(rows, grid)):
        for panel, axes, length in zip(row, cells, lengths):
            labels += _draw_panel(axes, panel, length)
        for axes in cells[1:]:
            axes.set_yticklabels([])
        if row_titles:
            cells[0].set_title(f"{row_titles[number]}\n{row[0].title}", loc="left", fontsize=9)
    for axes in grid[-1]:
        axes.set_xlabel("ms", fontsize=8)
    kinds = {bar.kind for row in rows for panel in row for bar in panel.bars}
    figure.legend(
        handles=[Patch(color=c, label=kind) for kind, c in COLOURS.items() if kind in kinds],
        loc="outside lower center",
        ncols=len(kinds),
        fontsize=8,
        frameon=False,
    )
    _write_labels(figure, labels)
    return figure


def save(figure: Figure, path: str | Path) -> None:
    """Write as SVG (text stays text) or PNG, by the suffix; the same figure gives the same bytes."""
    form = Path(path).suffix[1:]
    nameless = {"Date": None, "Creator": None} if form == "svg" else {"Software": None}
    with matplotlib.rc_context({"svg.hashsalt": "megatron_scmoe", "svg.fonttype": "none"}):
        figure.savefig(path, format=form, dpi=130, metadata=nameless)


def _traced_panel(direction: str, found: profiler_trace.Pass) -> Panel:
    streams: dict[int, list[profiler_trace.Kernel]] = {}
    for kernel in found.kernels:
        streams.setdefault(kernel.stream, []).append(kernel)

    def sends(stream: int) -> bool:
        return all(kernel.kind == profiler_trace.COMMUNICATION for kernel in streams[stream])

    def rail(stream: int) -> str:
        return f"{COMMUNICATION if sends(stream) else COMPUTE}, stream {stream}"

    bars = tuple(
        Bar(
            rail(kernel.stream),
            kernel.begin - found.begin,
            kernel.end - found.begin,
            kernel.kind,
            found.exchanges.get(kernel, _KERNEL_LABELS.get(kernel.kind, "")),
        )
        for kernel in found.kernels
    )
    compute = [(k.begin, k.end) for k in found.kernels if k.kind != profiler_trace.COMMUNICATION]
    return Panel(
        direction,
        tuple(rail(stream) for stream in sorted(streams, key=lambda s: (sends(s), s))),
        bars,
        found.end - found.begin,
        *profiler_trace.time_beside([(k.begin, k.end) for k in found.exchanges], compute),
    )


def _draw_panel(axes: Axes, panel: Panel, length: float) -> list[tuple[Axes, Bar, int]]:
    """Bars, axes, title; returns the labels to write once the size of everything is known."""
    place = {rail: number for number, rail in enumerate(panel.rails)}
    bars = sorted(panel.bars, key=lambda bar: bar.kind)
    for kind, run in groupby(bars, key=lambda bar: bar.kind):
        same = list(run)
        axes.barh(
            [place[bar.rail] for bar in same],
            [bar.end - bar.begin for bar in same],
            left=[bar.begin for bar in same],
            height=0.86,
            color=COLOURS[kind],
            edgecolor="white",  # an edge parts neighbours, but would hide the shortest
            linewidth=[0.5 if bar.end - bar.begin > length / 200 else 0.0 for bar in same],
        )
    axes.set_xlim(0, length * 1.002)
    axes.set_ylim(len(place) - 0.5, -0.5)
    axes.set_yticks(range(len(place)), place, fontsize=8)
    axes.tick_params(axis="x", labelsize=8)
    axes.spines[["top", "right"]].set_visible(False)
    axes.set_title(panel.title, loc="left", fontsize=9)
    return [(axes, bar, place[bar.rail]) for bar in panel.bars if bar.label]


def _write_labels(figure: Figure, labels: list[tuple[Axes, Bar, int]]) -> None:
    """Write each label into its bar if it fits, on one line or on several, or smaller."""
    figure.draw_without_rendering()  # places the axes
    for axes, bar, place in labels:
        (left, _), (right, _) = axes.transData.transform([(bar.begin, 0), (bar.end, 0)])
        lines = bar.label.replace(" ", "\n")
        for words, size in ((bar.label, 7), (lines, 7), (lines, 6)):
            text = axes.text(
                (bar.begin + bar.end) / 2,
                place,
                words,
                ha="center",
                va="center",
                fontsize=size,
                linespacing=0.95,
                color=_readable_on(COLOURS[bar.kind]),
            )
            text.set_in_layout(False)
            if text.get_window_extent().width <= 0.92 * (right - left):
                break
            text.remove()


def _readable_on(colour: str) -> str:
    red, green, blue = to_rgb(colour)
    return "black" if 0.3 * red + 0.59 * green + 0.11 * blue > 0.45 else "white"
