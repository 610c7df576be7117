"""A whole iteration, simulated: closed cases, and what one pair alone takes."""

import pytest

from megatron_scmoe.analysis.iteration_simulator import Iteration, simulate_iteration
from megatron_scmoe.analysis.simulator import OPERATORS, OperatorTimes, block_time
from megatron_scmoe.overlap.schedule import build_schedule, num_slots
from tests.unit.analysis.test_simulator import some_times

ALL = [(tap, slot) for tap in ("pos1", "pos2", "pos3") for slot in range(num_slots(tap))]


def only(forward: dict[str, float], backward: dict[str, float]) -> OperatorTimes:
    nothing = dict.fromkeys(OPERATORS, 0.0)
    return OperatorTimes(nothing | forward, nothing | backward)


@pytest.mark.parametrize("chunks", [1, 2])
@pytest.mark.parametrize("overlap", [True, False])
@pytest.mark.parametrize("tap,slot", ALL)
def test_without_data_parallelism_pairs_follow_each_other(tap, slot, overlap, chunks):
    times = some_times(5)
    schedule = build_schedule(tap, slot, overlap, chunks=chunks)
    found = simulate_iteration(schedule, times, Iteration(pairs=3, micro_batches=2, rest=1.5))
    assert found.total == pytest.approx(6 * block_time(schedule, times) + 2 * 1.5)


def test_reductions_hide_under_the_backward_that_is_left():
    times = only({"mlp": 10.0}, {"mlp": 20.0})
    around = Iteration(pairs=2, micro_batches=1, reduction=30.0, optimizer=5.0)
    found = simulate_iteration(build_schedule("pos2", 1, True), times, around)
    # Forward to 20, backward to 40 and 60; reductions from 40 to 70, from there to 100.
    assert found.total == pytest.approx(105.0)
    assert found.exposed == {"all-to-alls": 0.0, "gathers": 0.0, "reductions": pytest.approx(40.0)}


def test_gathers_are_waited_for_in_the_first_micro_batch_alone():
    times = only({"mlp": 10.0}, {"mlp": 20.0})
    around = Iteration(pairs=2, micro_batches=2, gather=8.0, edge_gather=4.0)
    found = simulate_iteration(build_schedule("pos2", 1, True), times, around)
    # The first pair begins at 12; the second's parameters are there at 20, before it begins at 22.
    assert found.exposed["gathers"] == pytest.approx(12.0)
    assert found.total == pytest.approx(12.0 + 4 * 30.0)


def test_transfers_under_way_together_share_the_link():
    # Backward of the second pair to 10; then its reduction beside the first pair's all-to-alls.
    times = only({}, {"mlp": 6.0, "second attention": 4.0, "combine": 3.0})
    schedule = build_schedule("pos2", 2, True)
    alone = simulate_iteration(schedule, times, Iteration(pairs=2, micro_batches=1))
    shared = simulate_iteration(schedule, times, Iteration(pairs=2, micro_batches=1, reduction=9.0))
    assert alone.exposed["all-to-alls"] == pytest.approx(6.0)  # no compute behind the slot
    assert shared.exposed["all-to-alls"] == pytest.approx(9.0)  # the second waits twice as long
