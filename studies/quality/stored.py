"""What a stored result says: its loss at the end, and its curve on the way."""

from collections.abc import Iterable
from statistics import mean

Curve = list[tuple[float, float]]
"""Tokens, and validation loss in nats a token."""


def loss(result: dict, source: str | None = None) -> float:
    """Validation loss in nats a token: of a source, or the mean of the sources."""
    found = result["validation"]
    if source is not None:
        return found[source]["loss"]
    return mean(found[name]["loss"] for name in found)


def paired_differences(
    results: Iterable[dict], baseline: Iterable[dict], source: str | None = None
) -> list[float]:
    """Loss less the baseline's, for each seed that both have."""
    base = {result["seed"]: loss(result, source) for result in baseline}
    return [
        loss(result, source) - base[result["seed"]] for result in results if result["seed"] in base
    ]


def curve(result: dict) -> Curve:
    """By tokens, of a part of the text; at 0 tokens stands the loss that it starts from.

    The last point that is stored is of the whole text, and left out.
    """
    step = result["tokens"] / result["iterations"]
    return [(iteration * step, loss) for iteration, loss in result["validation_curve"][:-1]]
