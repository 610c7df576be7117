"""What a stored result says: its loss at the end, and its curve on the way."""

from statistics import mean

Curve = list[tuple[float, float]]
"""Tokens, and validation loss in nats a token."""


def loss(result: dict, source: str | None = None) -> float:
    """Validation loss in nats a token: of a source, or the mean of the sources."""
    found = result["validation"]
    if source is not None:
        return found[source]["loss"]
    return mean(found[name]["loss"] for name in found)


def curve(result: dict) -> Curve:
    """By tokens; at 0 tokens stands the loss that it starts from.

    The last point is of the whole text, those before it are of a part.
    """
    step = result["tokens"] / result["iterations"]
    return [(iteration * step, loss) for iteration, loss in result["validation_curve"]]


def curve_on_the_way(result: dict) -> Curve:
    """The same of a part of the text alone, from the first point to the last."""
    return curve(result)[:-1]
