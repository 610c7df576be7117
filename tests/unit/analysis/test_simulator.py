"""Simulated rails against the paper's closed formula and hand-computed cases."""

import json
import random
from itertools import pairwise

import pytest

from megatron_scmoe.analysis.simulator import (
    COMMUNICATION,
    OPERATORS,
    OperatorTimes,
    block_time,
    simulate,
)
from megatron_scmoe.overlap.schedule import (
    BACKBONE_OPERATORS,
    TAP_BOUNDARY,
    build_schedule,
    num_slots,
)

ALL = [(tap, slot) for tap in TAP_BOUNDARY for slot in range(num_slots(tap))]


def some_times(seed: int) -> OperatorTimes:
    generator = random.Random(seed)
    return OperatorTimes(
        *({name: generator.uniform(0.1, 3.0) for name in OPERATORS} for _ in range(2))
    )


@pytest.mark.parametrize("seed", range(5))
@pytest.mark.parametrize("tap,slot", ALL)
def test_one_chunk_is_the_formula_of_the_paper(tap, slot, seed):
    times = some_times(seed)
    tapped = TAP_BOUNDARY[tap]
    total = 0.0
    for t in (times.forward, times.backward):
        backbone = [t[name] for name in BACKBONE_OPERATORS]
        before, after = backbone[tapped : tapped + slot], backbone[tapped + slot :]
        total += sum(backbone[:tapped]) + t["route"] + t["permute"] + t["experts"] + t["unpermute"]
        total += max(t["dispatch"], sum(before)) + max(t["combine"], sum(after))
    assert block_time(build_schedule(tap, slot, True), times) == pytest.approx(total)


@pytest.mark.parametrize("chunks", [1, 3])
@pytest.mark.parametrize("tap,slot", ALL)
def test_serial_is_the_sum_of_all(tap, slot, chunks):
    times = some_times(7)
    total = sum(times.forward.values()) + sum(times.backward.values())
    schedule = build_schedule(tap, slot, overlap=False, chunks=chunks)
    assert block_time(schedule, times) == pytest.approx(total)


def test_two_chunks_by_hand():
    """Dispatch 4, experts 2, combine 4, nothing to hide under: the rails of pos1, slot 0.

    communication: D1 0-2, D2 2-4, C1 4-6, C2 6-8; experts 1 at 2-3, experts 2 at 4-5.
    """
    forward = dict.fromkeys(OPERATORS, 0.0) | {"dispatch": 4.0, "experts": 2.0, "combine": 4.0}
    times = OperatorTimes(forward, dict.fromkeys(OPERATORS, 0.0))
    intervals = simulate(build_schedule("pos1", 0, True, chunks=2), times)
    assert [(i.name, i.begin, i.end) for i in intervals if i.end > i.begin] == [
        ("dispatch 1", 0, 2),
        ("dispatch 2", 2, 4),
        ("experts 1", 2, 3),
        ("combine 1", 4, 6),
        ("experts 2", 4, 5),
        ("combine 2", 6, 8),
    ]
    assert block_time(build_schedule("pos1", 0, True, chunks=2), times) == 8
    assert block_time(build_schedule("pos1", 0, True, chunks=1), times) == 10


@pytest.mark.parametrize("chunks", [1, 2, 4])
@pytest.mark.parametrize("late", [False, True])
@pytest.mark.parametrize("tap,slot", ALL)
def test_rails_hold_one_operator_at_a_time_and_backward_mirrors(tap, slot, late, chunks):
    times = some_times(3)
    schedule = build_schedule(tap, slot, True, launch_late=late, chunks=chunks)
    for backward in (False, True):
        intervals = simulate(schedule, times, backward)
        for rail in {i.rail for i in intervals}:
            own = [i for i in intervals if i.rail == rail]
            assert all(a.end <= b.begin for a, b in pairwise(own))
        durations = times.backward if backward else times.forward
        moved = sum(i.end - i.begin for i in intervals if i.rail == COMMUNICATION)
        assert moved == pytest.approx(durations["dispatch"] + durations["combine"])
    same = OperatorTimes(times.forward, times.forward)
    ahead, back = (max(i.end for i in simulate(schedule, same, b)) for b in (False, True))
    if chunks == 1:  # with more, the rails fill from the other end
        assert ahead == pytest.approx(back)


def test_times_survive_their_file(tmp_path):
    times = some_times(1)
    times.write(tmp_path / "times.json")
    assert OperatorTimes.read(tmp_path / "times.json") == times


@pytest.mark.parametrize(
    "content,fault",
    [
        ("not json", "Expecting value"),
        ("[]", "no object 'forward'"),
        ("[" * 100_000, "recursion"),
        ('{"forward": {}}', "forward 'attention' is None, not milliseconds"),
        (
            json.dumps({"forward": dict.fromkeys(OPERATORS, 1), "backward": {"attention": -1}}),
            "backward 'attention' is -1, not milliseconds",
        ),
    ],
)
def test_a_file_that_holds_something_else(tmp_path, content, fault):
    path = tmp_path / "times.json"
    path.write_text(content)
    with pytest.raises(ValueError, match=fault) as caught:
        OperatorTimes.read(path)
    assert str(path) in str(caught.value)
