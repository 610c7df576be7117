"""The report's part on time: how much sooner an arm reaches top-2's loss on a slow and on a fast link.

The study's models are too small to be trained on several GPUs. So time comes from whole runs of large
ones (benchmarks/train_run.py): a step of an arm is taken to last as long, compared with one of top-2,
as it did there.
"""

import json
import math
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from statistics import mean

from megatron_scmoe.platform.atomic_write import atomic_write
from megatron_scmoe.platform.command_line import UsageError
from studies.quality.stored import Curve, curve, loss, paired_differences

BENCHMARKS = Path(__file__).parents[2] / "benchmarks" / "results"

LINKS = {
    "host-staged, 2 GPUs, medium": "2xh200-medium-staged-train",
    "host-staged, 2 GPUs, wide": "2xh200-wide-staged-train",
    "host-staged, 2 GPUs, wide, real routing": "2xh100-wide-staged-real-train",
    "host-staged, 4 GPUs, wide": "4xh200-wide-staged-train",
    "host-staged, 8 GPUs, wide": "8xh200-wide-staged-train",
    "NVLink, 2 GPUs, fine": "2xh200-fine-native-train",
    "NVLink, 4 GPUs, fine": "4xh200-fine-native-train",
}
"""Files of the benchmarks, by what is said of them: whole runs of top-2 and ScMoE on GPUs, each
with what it chooses or the best settings."""

DRAWN = ("host-staged, 2 GPUs, wide", "NVLink, 2 GPUs, fine")

BASELINE = "top2"
SYSTEMS = {"top2": "top2", "shared": "shared", "pos2": "scmoe"}
"""Systems of the benchmarks, by arm."""


Groups = dict[tuple[str, int], dict[str, list[dict]]]
"""Results by size and tokens, then by arm."""


def step_times(name: str, folder: Path = BENCHMARKS) -> dict[str, float]:
    """Milliseconds of an iteration by arm, each with the settings that were fastest."""
    runs = json.loads((folder / f"{name}.json").read_text())["runs"]
    found = {}
    for arm, system in SYSTEMS.items():
        rows = [run for full, run in runs.items() if full.split("/")[0] == system]
        times = [run["iteration_ms"] for run in rows if run.get("iteration_ms")]
        if times:
            found[arm] = min(times)
    return found


def mean_curve(results: list[dict]) -> Curve:
    """Over the seeds of an arm, of the part of the text that is evaluated on the way.

    Raises:
        UsageError: if they were not evaluated at the same iterations.
    """
    curves = [curve(result) for result in results]
    places = [[tokens for tokens, _ in points] for points in curves]
    if any(other != places[0] for other in places):
        raise UsageError(
            f"--results: {results[0]['size']}-{results[0]['arm']} was evaluated at other iterations "
            "with one seed than with another; accepted: results of one batch and length"
        )
    return [(points[0][0], mean(loss for _, loss in points)) for points in zip(*curves)]


def reached_at(points: Curve, loss: float) -> float | None:
    """Tokens at which a curve first is at a loss, on the line between two points, or None."""
    if points[0][1] <= loss:
        return points[0][0]
    for (begin, above), (end, below) in pairwise(points):
        if below <= loss:
            return begin + (end - begin) * (above - loss) / (above - below)
    return None


@dataclass(frozen=True)
class Trend:
    """Loss at the end of runs of an arm by their length: a line over the logarithm of the tokens.

    Args:
        shorter: tokens, and mean loss of the seeds.
        longer: the same.
    """

    shorter: tuple[float, float]
    longer: tuple[float, float]

    def share_of_tokens(self, behind: float) -> float:
        """How many of the longer runs' tokens a run takes that ends where top-2 does.

        Args:
            behind: how far above top-2 the longer runs end, in nats a token; negative if below.
        """
        (fewer, higher), (more, lower) = self.shorter, self.longer
        return math.exp(behind * math.log(more / fewer) / (higher - lower))


def trend(groups: Groups, size: str, tokens: int, arm: str) -> Trend | None:
    """Of the runs of so many tokens and the next shorter ones of the same, if there are any.

    Of the seeds that both have.
    """
    lengths = [
        asked
        for other, asked in groups
        if other == size and asked < tokens and arm in groups[other, asked]
    ]
    if not lengths:
        return None
    runs = [groups[size, asked][arm] for asked in (max(lengths), tokens)]
    seeds = _shared_seeds(runs)
    if not seeds:
        return None
    shorter, longer = (
        (float(asked), mean(loss(result) for result in each if result["seed"] in seeds))
        for asked, each in zip((max(lengths), tokens), runs)
    )
    return Trend(shorter, longer) if longer[1] < shorter[1] else None


def section(groups: Groups, picture: str) -> str:
    """In Markdown; empty without results.

    Args:
        groups: results by size and tokens, then by arm.
    """
    rows = list(_rows(groups))
    if not rows:
        return ""
    return "\n".join(
        [
            "## Time",
            "",
            "How much sooner a run ends at the loss that top-2 ends with. A step of it is taken to "
            "last as long, compared with top-2's, as in whole runs of the benchmarks "
            "(`benchmarks/RESULTS.md`). *Tokens*: those that it takes, of top-2's. They are computed "
            "from the difference at the same tokens and from the arm's own runs of two lengths, whose "
            "loss is taken to fall on a line over the logarithm of the tokens; above 100 % it is "
            "extended. The mean of the seeds, and by each seed.",
            "",
            f"![Loss against time]({picture})",
            "",
            "| size, M tokens | arm | link, model | step, of top-2's | tokens | sooner | by seed |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


def _rows(groups: Groups) -> Iterator[str]:
    times_of = {link: step_times(name) for link, name in LINKS.items()}
    for (size, asked), arms in groups.items():
        for arm in SYSTEMS:
            if arm == BASELINE or not {arm, BASELINE} <= arms.keys():
                continue
            line = trend(groups, size, asked, arm)
            behind = paired_differences(arms[arm], arms[BASELINE])
            if line is None or not behind:
                continue
            tokens = line.share_of_tokens(mean(behind))
            for link, times in times_of.items():
                if arm in times:
                    step = times[arm] / times[BASELINE]
                    seeds = [f"{1 / (step * line.share_of_tokens(one)):.2f}x" for one in behind]
                    yield (
                        f"| {size}, {asked / 1e6:g} | {arm} | {link} | {step:.3f} | {tokens:.0%} | "
                        f"{1 / (step * tokens):.2f}x | {', '.join(seeds)} |"
                    )


def _shared_seeds(runs: Iterable[list[dict]]) -> set[int]:
    """Those that all of them have."""
    return set.intersection(*({result["seed"] for result in each} for each in runs))


def draw(groups: Groups, path: Path) -> None:
    """A row for each size: loss against time on a slow link, and on a fast one, of the longest runs.

    Nothing without an arm that the benchmarks have.
    """
    from matplotlib import pyplot

    groups = {
        key: {arm: runs for arm, runs in arms.items() if arm in SYSTEMS}
        for key, arms in groups.items()
    }
    longest = {size: asked for (size, asked), arms in sorted(groups.items()) if len(arms) > 1}
    groups = {key: arms for key, arms in groups.items() if longest.get(key[0]) == key[1]}
    if not groups:
        return
    figure, axes = pyplot.subplots(
        len(groups), 2, figsize=(11, 3.6 * len(groups)), squeeze=False, layout="constrained"
    )
    for row, ((size, tokens), arms) in zip(axes, groups.items()):
        seeds = _shared_seeds(arms.values())
        for axis, link in zip(row, DRAWN):
            times = step_times(LINKS[link])
            for arm in SYSTEMS:
                if seeds and arm in arms and arm in times:
                    points = mean_curve([run for run in arms[arm] if run["seed"] in seeds])
                    share = times[arm] / times[BASELINE] / points[-1][0]
                    shown = [(at * share, loss) for at, loss in points]
                    axis.plot(*zip(*shown), marker=".", label=arm)
            axis.set_title(f"{size}, {tokens / 1e6:g} M tokens, {link}")
            axis.set_xlabel("time, of that of top2's run")
            axis.set_ylabel("validation loss")
            axis.legend(fontsize="small")
    with atomic_write(path) as (file,):
        figure.savefig(file, format="png", dpi=100)
    pyplot.close(figure)
