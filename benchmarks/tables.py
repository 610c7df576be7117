"""Tables of Markdown."""

from collections.abc import Iterable, Iterator


def table(heads: list[str], rows: Iterable[list[str]]) -> Iterator[str]:
    """The lines of a table, and an empty one behind it."""
    yield f"| {' | '.join(heads)} |"
    yield f"| {' | '.join('---' for _ in heads)} |"
    for row in rows:
        yield f"| {' | '.join(row)} |"
    yield ""
