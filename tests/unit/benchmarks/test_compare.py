"""compare.py: a system that has lost speed against its baseline is named, whatever the machine."""

import copy
import json
import sys

import pytest

from megatron_scmoe.platform.command_line import UsageError
from tests.benchmarks import benchmark, stored

STORED = stored("cpu-2hosts-400mbit")


@pytest.fixture
def result():
    return json.loads(STORED.read_text())


@pytest.fixture
def compare(tmp_path, monkeypatch, capsys):
    """Compares a result with the stored one: the exit status, and the lines that are printed."""

    def call(result: dict, *words: str) -> tuple[int, list[str]]:
        path = tmp_path / "new.json"
        path.write_text(json.dumps(result))
        monkeypatch.setattr(sys, "argv", ["compare.py", str(path), str(STORED), *words])
        status = 0
        try:
            benchmark("compare").main()
        except SystemExit as end:
            status = end.code
        printed = capsys.readouterr()
        return status, (printed.out + printed.err).splitlines()

    return call


def test_a_machine_half_as_fast_has_lost_nothing(compare, result):
    for row in result["systems"].values():
        for key in ("step_ms", "forward_ms", "train_ms"):
            row[key] *= 2
    status, lines = compare(result, "--tolerance", "0.001")
    assert status == 0
    assert lines == [
        "none of top2, top1, shared, shared-overlap, scmoe-serial, scmoe, floor has lost more than "
        "0.1%"
    ]


def test_one_line_for_each_system_that_has_lost_more_than_the_tolerance(compare, result):
    result["systems"]["scmoe"]["step_ms"] /= 0.8
    result["systems"]["scmoe"]["train_ms"] /= 0.85
    result["systems"]["shared"]["forward_ms"] /= 0.88
    result["systems"]["floor"]["step_ms"] /= 0.95
    status, lines = compare(result)
    assert status == 1
    assert lines == [
        "shared over top2: forward 1.188x, stored 1.350x (-12.0%); accepted: -10.0%",
        "scmoe over top2: step 1.236x, stored 1.545x (-20.0%); train 1.303x, stored 1.533x "
        "(-15.0%); accepted: -10.0%",
    ]
    assert compare(result, "--tolerance", "0.21")[0] == 0


def test_a_faster_baseline_is_a_loss_of_all_others(compare, result):
    for key in ("step_ms", "forward_ms", "train_ms"):
        result["systems"]["top2"][key] *= 0.7
    status, lines = compare(result)
    assert status == 1
    assert [line.split()[0] for line in lines] == list(result["systems"])[1:]


def test_systems_that_were_not_measured_again_are_left_out(compare, result):
    result["systems"] = {name: result["systems"][name] for name in ("top2", "scmoe")}
    assert compare(result) == (0, ["none of top2, scmoe has lost more than 10.0%"])


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda new: new["sizes"].update(blocks=2), "blocks is 2; accepted: 4, as in {stored}"),
        (lambda new: new.update(tap="pos3"), "tap is 'pos3'; accepted: 'pos2', as in {stored}"),
        (
            lambda new: new.pop("train_micro_batches"),  # measured before the flag, so with one
            "train_micro_batches is 1; accepted: 4, as in {stored}",
        ),
        (
            lambda new: new["systems"].pop("top2"),
            "systems top1, shared, shared-overlap, scmoe-serial, scmoe, floor; accepted: top2 and "
            "another of top2, top1, shared, shared-overlap, scmoe-serial, scmoe, floor",
        ),
    ],
)
def test_another_measurement_is_refused_by_name(compare, result, change, message):
    new = copy.deepcopy(result)
    change(new)
    with pytest.raises(UsageError) as refused:
        compare(new)
    assert str(refused.value).endswith(f"new.json: {message.format(stored=STORED)}")


@pytest.mark.parametrize("given", ["1", "-0.1", "much", "nan"])
def test_a_tolerance_is_a_fraction(compare, result, given):
    status, lines = compare(result, f"--tolerance={given}")
    assert status == 2
    assert len(lines) == 1
    assert f"--tolerance: {given}: accepted are numbers from 0 to below 1" in lines[0]
