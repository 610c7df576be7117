"""The report's part on conversion: converted models against the original continued."""

from collections import defaultdict
from pathlib import Path
from statistics import mean

from megatron_scmoe.platform.atomic_write import atomic_write
from studies.quality.arms import CONTINUED
from studies.quality.stored import Curve, curve


def pairs(results: list[dict]) -> list[tuple[dict, dict]]:
    """Converted runs, each with the one that continues the same weights on the same tokens."""
    found = {_key(result, result["arm"]): result for result in results}
    matched = []
    for result in results:
        continued = found.get(_key(result, CONTINUED.get(result["arm"], "")))
        if continued is not None:
            matched.append((result, continued))
    return matched


def level_after(converted: Curve, continued: Curve) -> float | None:
    """Tokens from which on the converted model's loss is never above the continued one's.

    Between two points of the curves, which are at the same tokens, their difference is taken as a
    line. None if the loss is above at the end.
    """
    above = [loss - other for (_, loss), (_, other) in zip(converted, continued, strict=True)]
    last = max((n for n, difference in enumerate(above) if difference > 0), default=None)
    if last is None:
        return 0.0
    if last == len(above) - 1:
        return None
    (begin, _), (end, _) = converted[last : last + 2]
    return begin + (end - begin) * above[last] / (above[last] - above[last + 1])


def section(results: list[dict], picture: str) -> str:
    """In Markdown; empty without results."""
    groups = _groups(results)
    if not groups:
        return ""
    lines = [
        "## Conversion",
        "",
        "A trained model is upcycled into ScMoE and trained on; the original goes on with the same "
        "tokens in the same order. Both begin with a new optimizer and the learning rate of a new "
        "run. Losses are of the part of the text that is evaluated on the way. *Level after*: tokens "
        "from which on the converted model is never worse; the mean of the seeds that come there.",
        "",
        f"![Converted and continued, loss against tokens]({picture})",
        "",
        "| size | arm | tokens before, after (M) | active (M): continued, converted | seeds | "
        "loss at the start: continued, converted | at the end: continued, converted | "
        "level after (M tokens) |",
        "| --- | --- | --- | --- | --- | --- | --- | --- |",
    ]
    for (size, arm, before, after), runs in groups.items():
        active = [runs[0][side]["active_parameters"] / 1e6 for side in (1, 0)]
        start, end = (
            [mean(curve(pair[side])[point][1] for pair in runs) for side in (1, 0)]
            for point in (0, -1)
        )
        reached = [level_after(curve(converted), curve(other)) for converted, other in runs]
        level = [tokens / 1e6 for tokens in reached if tokens is not None]
        shown = f"{mean(level):.1f}" if level else "not reached"
        if 0 < len(level) < len(runs):
            shown += f" ({len(level)} of {len(runs)} seeds)"
        lines.append(
            f"| {size} | {arm} | {before / 1e6:g}, {after / 1e6:g} | "
            f"{active[0]:.1f}, {active[1]:.1f} | {len(runs)} | {start[0]:.4f}, {start[1]:.4f} | "
            f"{end[0]:.4f}, {end[1]:.4f} | {shown} |"
        )
    return "\n".join(lines)


def draw(results: list[dict], path: Path) -> None:
    """Loss against tokens, one panel for each row of the table; the first seed."""
    from matplotlib import pyplot

    groups = _groups(results)
    figure, axes = pyplot.subplots(
        1, len(groups), figsize=(5 * len(groups), 3.6), squeeze=False, layout="constrained"
    )
    for axis, ((size, arm, before, _), runs) in zip(axes[0], groups.items()):
        for result in runs[0]:
            points = curve(result)
            axis.plot([n / 1e6 for n, _ in points], [y for _, y in points], label=result["arm"])
        axis.set_title(f"{size}, {arm}, after {before / 1e6:g} M tokens")
        axis.set_xlabel("million tokens since")
        axis.set_ylabel("validation loss")
        axis.legend()
    with atomic_write(path) as (file,):
        figure.savefig(file, format="png", dpi=110)
    pyplot.close(figure)


def _key(result: dict, arm: str) -> tuple:
    same = ("size", "seed", "base_tokens", "tokens_asked", "learning_rate")
    return (arm, *(result.get(name) for name in same))


def _groups(results: list[dict]) -> dict[tuple, list[tuple[dict, dict]]]:
    groups = defaultdict(list)
    for pair in pairs(results):
        result = pair[0]
        key = (result["size"], result["arm"], result["base_tokens"], result["tokens_asked"])
        groups[key].append(pair)
    return dict(groups)
