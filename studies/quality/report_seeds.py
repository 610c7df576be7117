"""The report's part on seeds: when a model begins to copy, and what its loss is at the end."""

from collections.abc import Iterator
from statistics import correlation

from studies.quality.report_hours import mean_curve, reached_at
from studies.quality.stored import loss

ONSET = 3.75
"""Nats a token; the loss falls past it while models learn to use text that repeats itself."""

FEWEST = 5
"""Runs of which a correlation is given."""


def section(groups: dict[tuple[str, int], list[dict]]) -> str:
    """In Markdown; empty without enough results.

    Args:
        groups: results by size and tokens.
    """
    rows = list(_rows(groups))
    if not rows:
        return ""
    return "\n".join(
        [
            "## Seeds",
            "",
            "Of the runs of a size, all arms together: how their loss at the end correlates with the "
            f"step at which the validation loss on the way passed {ONSET}, and with the share of right "
            "guesses by kind. *Spread*: the most by which that step differs between two seeds of one "
            "arm.",
            "",
            "| size, M tokens | runs | with the step | spread, steps | repeated pairs | brackets "
            "| names |",
            "| --- | --- | --- | --- | --- | --- | --- |",
            *rows,
        ]
    )


def _rows(groups) -> Iterator[str]:
    for (size, asked), results in groups.items():
        found = [(result, onset(result)) for result in results if "guesses" in result]
        found = [(result, step) for result, step in found if step is not None]
        if len(found) < FEWEST:
            continue
        losses = [loss(result) for result, _ in found]
        by_arm: dict[str, list[float]] = {}
        for result, step in found:
            by_arm.setdefault(result["arm"], []).append(step)
        spread = max(max(steps) - min(steps) for steps in by_arm.values())
        shares = [
            correlation(losses, [r["guesses"][kind]["right"] for r, _ in found])
            for kind in ("repeated", "bracket", "name")
        ]
        cells = " | ".join(f"{share:.2f}" for share in shares)
        steps = correlation(losses, [step for _, step in found])
        yield f"| {size}, {asked / 1e6:g} | {len(found)} | {steps:.2f} | {spread:.0f} | {cells} |"


def onset(result: dict) -> float | None:
    """The step at which a run's validation loss passed :data:`ONSET`; None if it did not."""
    tokens = reached_at(mean_curve([result]), ONSET)
    return None if tokens is None else tokens / (result["tokens"] / result["iterations"])
