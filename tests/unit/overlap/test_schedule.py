"""The schedule as data: what happens at which boundary, for each tap and slot."""

import pytest

from megatron_scmoe.overlap.schedule import (
    BACKBONE_OPERATORS,
    TAP_BOUNDARY,
    Action,
    Boundary,
    Step,
    build_schedule,
    num_slots,
)

ALL = [(tap, slot) for tap in TAP_BOUNDARY for slot in range(num_slots(tap))]


def test_slots_are_those_of_the_paper():
    assert {tap: num_slots(tap) for tap in TAP_BOUNDARY} == {"pos1": 3, "pos2": 4, "pos3": 5}


def test_pos2_default_slot_reads_as_in_the_paper():
    assert build_schedule("pos2", 1, overlap=True).events() == [
        "attention",
        "route",
        "permute",
        "launch dispatch",
        "mlp",
        "wait dispatch",
        "experts",
        "launch combine",
        "second attention",
        "shared expert",
        "wait combine",
        "unpermute",
    ]


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("tap,slot", ALL)
def test_every_step_once_and_in_order(tap, slot, overlap):
    schedule = build_schedule(tap, slot, overlap)
    steps = [action.step for boundary in Boundary for action in schedule.at(boundary)]
    assert steps == list(Step)


@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("tap,slot", ALL)
def test_every_step_once_for_every_chunk_and_in_order(tap, slot, overlap):
    schedule = build_schedule(tap, slot, overlap, chunks=3)
    actions = [action for boundary in Boundary for action in schedule.at(boundary)]
    assert actions[0] == Action(Step.ROUTE)
    for chunk in range(3):
        steps = [action.step for action in actions[1:] if action.chunk == chunk]
        assert steps == list(Step)[1:]


def test_chunks_are_all_under_way_before_the_first_is_waited_for():
    assert build_schedule("pos1", 1, overlap=True, chunks=2).events() == [
        "attention",
        "mlp",
        "route",
        "permute 1",
        "launch dispatch 1",
        "permute 2",
        "launch dispatch 2",
        "second attention",
        "wait dispatch 1",
        "experts 1",
        "launch combine 1",
        "wait dispatch 2",
        "experts 2",
        "launch combine 2",
        "shared expert",
        "wait combine 1",
        "unpermute 1",
        "wait combine 2",
        "unpermute 2",
    ]


@pytest.mark.parametrize("tap,slot", ALL)
def test_slot_operators_lie_between_dispatch_halves_and_the_rest_between_combine_halves(tap, slot):
    events = build_schedule(tap, slot, overlap=True).events()
    behind_tap = list(BACKBONE_OPERATORS[TAP_BOUNDARY[tap] :])
    assert _between(events, Step.LAUNCH_DISPATCH, Step.WAIT_DISPATCH) == behind_tap[:slot]
    assert _between(events, Step.LAUNCH_COMBINE, Step.WAIT_COMBINE) == behind_tap[slot:]


@pytest.mark.parametrize("tap,slot", ALL)
def test_serial_waits_follow_their_launches(tap, slot):
    events = build_schedule(tap, slot, overlap=False).events()
    assert _between(events, Step.LAUNCH_DISPATCH, Step.WAIT_DISPATCH) == []
    assert _between(events, Step.LAUNCH_COMBINE, Step.WAIT_COMBINE) == []


@pytest.mark.parametrize("tap,slot", ALL)
def test_late_launch_comes_one_backbone_operator_after_the_permutation(tap, slot):
    events = build_schedule(tap, slot, overlap=True, launch_late=True).events()
    behind_tap = list(BACKBONE_OPERATORS[TAP_BOUNDARY[tap] :])
    assert _between(events, Step.PERMUTE, Step.LAUNCH_DISPATCH) == behind_tap[: min(slot, 1)]
    assert _between(events, Step.PERMUTE, Step.WAIT_DISPATCH) in (
        [*behind_tap[:1], "launch dispatch", *behind_tap[1:slot]],
        ["launch dispatch"],
    )


@pytest.mark.parametrize("tap,slot", [("pos1", 3), ("pos2", 4), ("pos3", 5), ("pos2", -1)])
def test_slot_outside_the_range_of_its_tap(tap, slot):
    with pytest.raises(ValueError, match=rf"slot {slot} is outside 0 to {num_slots(tap) - 1}"):
        build_schedule(tap, slot, overlap=True)


def _between(events, first: Step, last: Step) -> list[str]:
    return events[events.index(first.value) + 1 : events.index(last.value)]
