"""Whom the others wait for, told from beats."""

import json
import re
import threading
import time

import pytest
import torch

from megatron_scmoe.platform.command_line import LAST_WORD_S
from megatron_scmoe.training.heartbeats import (
    BEAT_S,
    Heartbeats,
    LostRankError,
    _place_of_main_thread,
    _read,
    judge,
)


def beats(*changes: dict) -> list[dict]:
    """Of ranks that wait for others, but for these changes; each has just beaten."""
    usual = {"count": 7, "iteration": 12, "is_failing": False, "place": None}
    return [usual | {"host": f"node{rank}"} | change for rank, change in enumerate(changes)]


def after(earlier: list[dict], *silent: int) -> list[dict]:
    return [
        beat | {"count": beat["count"] + (rank not in silent)} for rank, beat in enumerate(earlier)
    ]


def test_a_rank_without_a_beat_is_lost():
    earlier = beats({}, {}, {})
    assert judge(earlier, after(earlier, 2)).startswith(
        "rank 2 on node2 is silent, after iteration 12 or later: it was ended or stopped"
    )


def test_a_rank_that_waits_for_nobody_hangs():
    now = beats(
        {"is_failing": True, "place": "heartbeats.py:1 (ask)"}, {}, {"place": "data.py:7 (f)"}
    )
    assert judge(now, after(now)).startswith(
        "rank 2 on node2 hangs in iteration 12, at data.py:7 (f): the others waited"
    )


def test_a_rank_that_never_began_is_named_and_not_waited_for():
    store = torch.distributed.HashStore()
    store.set("beat/0", json.dumps(beats({"is_failing": True})[0]))
    earlier = _read(store, 2)
    now = [*after(earlier[:1]), None]
    assert judge(earlier, now).startswith("rank 1 has begun no iteration: it hangs before")


def test_a_rank_that_hangs_goes_before_stages_that_have_not_begun():
    now = [*beats({"place": "data.py:7 (f)"}), None, None]
    assert judge(now, [*after(now[:1]), None, None]).startswith("rank 0 on node0 hangs")
    assert judge([None, None], [None, None]) is None


@pytest.mark.parametrize("places", [(None, None), ("a.py:1 (f)", "b.py:2 (g)")])
def test_where_beats_do_not_tell_nothing_is_said(places):
    now = beats(*({"place": place} for place in places))
    assert judge(now, after(now)) is None


def place_during(act) -> str | None:
    """What a thread sees of the main thread, a moment after it has begun to act."""
    found = []

    def look():
        time.sleep(0.1)
        found.append(_place_of_main_thread())

    thread = threading.Thread(target=look)
    thread.start()
    act(found)
    thread.join()
    return found[0]


def test_the_place_is_the_main_threads():
    def spin(found):
        while not found:
            pass

    assert re.fullmatch(r"training/test_heartbeats\.py:\d+ \(spin\)", place_during(spin))


def test_who_waits_for_other_ranks_has_no_place():
    def wait(found):
        while not found:
            time.sleep(0.01)

    code = compile(
        "def all_reduce(wait, found): wait(found)",
        "x/torch/distributed/distributed_c10d.py",
        "exec",
    )
    names: dict = {}
    exec(code, names)
    assert place_during(lambda found: names["all_reduce"](wait, found)) is None


def test_an_error_of_its_own_is_not_explained():
    with pytest.raises(ValueError, match="a bug"), Heartbeats().name_who_is_lost():
        raise ValueError("a bug")


def test_one_rank_has_nobody_to_wait_for():
    with pytest.raises(RuntimeError), Heartbeats().name_who_is_lost():
        raise RuntimeError("gloo: Connection closed by peer")


def test_the_answer_comes_before_another_rank_speaks():
    assert 2.5 * BEAT_S < LAST_WORD_S
    assert LostRankError("").status == 1
