"""The link between two hosts is cut, slowed, or comes and goes."""

import re
import threading
import time

import pytest

from tests.faults.jobs import TIMEOUT_S
from tests.faults.test_faults import END_OF_OTHERS_S, goes_on
from tests.faults.two_hosts import WHY_NOT, run_on_two_hosts, switch, wait_until

pytestmark = pytest.mark.skipif(bool(WHY_NOT), reason=WHY_NOT)


@pytest.fixture
def joined():
    with switch() as joined:
        yield joined


def test_a_cut_link(job, whole, joined, row):
    def cut(process, screen):
        wait_until(lambda: list(job.checkpoints.glob("iter_0000003/metadata.json")))
        time.sleep(0.1)
        joined.cut()
        screen.lines.append((time.monotonic(), "FAULT link cut"))

    joined.slow("5mbit")  # so that there is time to cut it
    ends = run_on_two_hosts(job, joined, cut)

    first = ends[0]  # which holds the rendezvous; the other's torchrun waits for it, and is killed
    assert first.status == 1
    assert first.to_end_s < TIMEOUT_S + END_OF_OTHERS_S
    assert re.search(
        r"error: rank \d on \S+ is silent, .* or the network to it", first.screen.last_line
    )
    kept = int(job.tracker())
    back = goes_on(job, whole, saved=kept)
    row("link between two hosts cut", str(kept), first, back, first.screen.last_line)


def test_a_slow_link(job, whole, joined, row):
    joined.slow("2mbit")
    ends = run_on_two_hosts(job, joined)
    assert [end.status for end in ends] == [0, 0], ends[0].screen.text[-2000:]
    assert job.losses() == whole
    row("link slowed to 2 Mbit/s", "does not end", None, None)


def test_a_flapping_link(job, whole, joined, row):
    """Shorter than the timeout: TCP repeats what was lost."""
    over = threading.Event()

    def flap(process, screen):
        wait_until(
            lambda: (
                " iteration        1/" in screen.text
                or list((job.folder / "tensorboard").glob("*"))
            )
        )
        for _ in range(3):
            joined.cut()
            time.sleep(1)
            joined.join()
            time.sleep(1)
        over.set()

    ends = run_on_two_hosts(job, joined, flap)
    assert over.is_set()
    assert [end.status for end in ends] == [0, 0], ends[0].screen.text[-2000:]
    assert job.losses() == whole
    row("link gone for 1 s, three times", "does not end", None, None)
