"""The data, an undisturbed job, and the table of what was measured."""

from pathlib import Path

import pytest

from tests.faults.jobs import ITERATIONS, Job, Outcome
from tests.small_run import write_dataset

ROWS: list[tuple[str, str, float | None, float | None, str]] = []
"""Fault, what is left, seconds to the end, seconds to be back, the last line."""


@pytest.fixture(scope="session")
def data(tmp_path_factory) -> Path:
    return write_dataset(tmp_path_factory.mktemp("data") / "text")


@pytest.fixture(scope="session")
def whole(data, tmp_path_factory) -> dict[int, set[float]]:
    """The losses of a job to which nothing happens."""
    job = Job(tmp_path_factory.mktemp("whole"), data)
    ended = job.run()
    assert ended.status == 0, ended.screen.text[-3000:]
    losses = job.losses()
    assert sorted(losses) == list(range(1, ITERATIONS + 1))
    return losses


@pytest.fixture
def job(data, tmp_path) -> Job:
    return Job(tmp_path, data)


@pytest.fixture
def row():
    """Write a row of the table."""

    def add(fault: str, kept: str, end: Outcome | None, back: Outcome | None, line: str = ""):
        ROWS.append(
            (fault, kept, end and end.to_end_s, back and back.to_be_back_s, line.replace("|", "/"))
        )

    return add


def pytest_terminal_summary(terminalreporter):
    if not ROWS:
        return
    lines = [("fault", "goes on from", "s to the end", "s to be back", "last line")]
    lines += [("---",) * 5]
    for fault, kept, end, back, line in ROWS:
        times = ["-" if each is None else f"{each:.0f}" for each in (end, back)]
        lines.append((fault, kept, *times, line))
    terminalreporter.section("what happened after each fault")
    for line in lines:
        terminalreporter.write_line(f"| {' | '.join(line)} |")
