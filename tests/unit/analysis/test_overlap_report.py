"""Times of exchanges become figures, and these a line; all by hand."""

from math import isnan, nan

import pytest

from megatron_scmoe.analysis.overlap_report import (
    OverlapReport,
    RankFigures,
    covered,
    rank_figures,
    stall,
)
from megatron_scmoe.overlap.exchange_times import ExchangeTimes


def exchange(begun, done, reached, resumed, is_backward=False, lead=1.0):
    return ExchangeTimes(is_backward, begun, done, reached, resumed, lead)


def rank(**figures) -> RankFigures:
    some = dict(span_ms=100.0, forward_ms=10.0, backward_ms=10.0, exposed_forward_ms=1.0)
    some |= dict(exposed_backward_ms=4.0, lead_ms=nan, late_share=nan)
    return RankFigures(**some | figures)


@pytest.mark.parametrize(
    ("spans", "length"),
    [([], 0), ([(0, 2), (5, 6)], 3), ([(5, 6), (0, 2), (1, 5.5)], 6), ([(0, 9), (1, 2)], 9)],
)
def test_what_is_under_way_twice_counts_once(spans, length):
    assert covered(spans) == length


@pytest.mark.parametrize(
    ("times", "waited"),
    [
        (exchange(0, 10, 6, 10), 4),
        (exchange(0, 5, 6, 6), 0),
        (exchange(0, 7, 6, 9), 1),  # the host issued nothing until 9
        (exchange(0, None, 6, 9), 3),
    ],
)
def test_the_compute_waits_until_all_has_arrived(times, waited):
    assert stall(times) == waited


def test_each_way_has_figures_of_its_own():
    figures = rank_figures(
        [
            exchange(0, 10, 6, 10, lead=0.5),
            exchange(20, 24, 30, 30, lead=0.05),
            exchange(40, 47, 46, 47, is_backward=True, lead=3.0),
        ],
        host_runs_ahead=True,
    )
    assert figures[:7] == (47, 14, 7, 4, 1, 0.5, pytest.approx(1 / 3))


def test_a_cpu_has_no_lead():
    assert isnan(rank_figures([exchange(0, 1, 1, 1)], host_runs_ahead=False).lead_ms)


def test_all_ranks_count():
    late = rank(exposed_backward_ms=8.0)
    report = OverlapReport([rank(), late], overlap=True)
    assert report.hidden_share == pytest.approx(1 - 7 / 20)
    assert report.scalars()["scmoe/exposed-ms-max"] == 9


@pytest.mark.parametrize(
    ("figures", "overlap", "said"),
    [
        ({}, True, "hidden: 75.0% |"),
        ({}, False, "hidden: 0.0% (serial)"),
        ({"forward_ms": nan}, True, "hidden: not known with CUDA_DEVICE_MAX_CONNECTIONS=1"),
        ({"lead_ms": 2.5, "late_share": 0.125}, True, "host lead (ms): 2.50, late at 12% of waits"),
        ({"gate": 0.25, "zero_share": 0.5}, True, "gate: 0.250 | zero experts: 50.0% |"),
        (dict.fromkeys(RankFigures._fields, 0.0), True, "no all-to-all |"),
    ],
)
def test_the_line_says_what_is_known(figures, overlap, said):
    line = OverlapReport([rank(**figures)], overlap).line(7)
    assert line.startswith(" overlap of iteration        7 | ")
    assert said in line
    assert "nan" not in line


@pytest.mark.parametrize(
    ("figures", "overlap", "is_late", "is_exposed"),
    [
        ({}, True, False, False),
        ({"exposed_forward_ms": 9.0}, True, False, True),
        ({"exposed_forward_ms": 9.0, "span_ms": 1000.0}, True, False, False),
        ({"forward_ms": nan, "exposed_forward_ms": 9.0}, True, False, True),
        ({"exposed_forward_ms": 9.0}, False, False, True),
        ({"lead_ms": 0.05}, True, True, False),
        ({"lead_ms": 5.0}, True, False, False),
    ],
)
def test_what_is_amiss(figures, overlap, is_late, is_exposed):
    report = OverlapReport([rank(**figures)], overlap)
    assert (report.is_late, report.is_exposed) == (is_late, is_exposed)
