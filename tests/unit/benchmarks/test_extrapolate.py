"""extrapolate.py: what a stored result would be on more GPUs."""

import json
import subprocess
import sys

import pytest

from tests.benchmarks import BENCHMARKS, environment, stored

RESULT = stored("cpu-2hosts-400mbit")
SYSTEMS = ["top2", "shared", "scmoe-serial", "scmoe", "floor"]


def test_for_as_many_ranks_it_stays_as_measured():
    same = extrapolate("--gpus", "2")
    systems = json.loads(RESULT.read_text())["systems"]
    for name in SYSTEMS:
        assert float(same[name][0]) == pytest.approx(systems[name]["step_ms"], abs=0.06)


def test_for_more_ranks_top2_waits_for_twice_the_tokens():
    more = extrapolate("--gpus", "4")
    found = json.loads(RESULT.read_text())
    times, pairs = found["operators"], found["sizes"]["blocks"] // 2
    moved = sum(times[d][o] for d in ("forward", "backward") for o in ("dispatch", "combine"))
    for name, volume in (("top2", 2), ("shared", 1), ("floor", 0)):
        longer = pairs * volume * moved / 2  # 3/4 of the tokens leave their rank instead of 1/2
        expected = found["systems"][name]["step_ms"] + longer
        assert float(more[name][0]) == pytest.approx(expected, abs=0.06)


@pytest.mark.parametrize(
    ("name", "message"),
    [
        ("1xh200-wide", "measured on 1 GPU, where nothing leaves it; accepted: 2 or more"),
        ("2xh200-wide-staged-pos3", "top2 was not measured; accepted: a result with it"),
        ("2xh200-wide-operator-times", "it is no result of step_time.py; accepted: its --json"),
        ("nothing", "No such file or directory"),
    ],
)
def test_what_it_cannot_read_is_one_line(name, message):
    run = call(stored(name))
    assert run.returncode == 2
    assert run.stderr == f"extrapolate.py: error: {stored(name)}: {message}\n"


def extrapolate(*words: str) -> dict[str, list[str]]:
    """The printed columns by system."""
    run = call(RESULT, *words)
    assert run.returncode == 0, run.stderr[-2000:]
    return {line.split()[0]: line.split()[1:] for line in run.stdout.splitlines()[2:]}


def call(*words) -> subprocess.CompletedProcess:
    command = [sys.executable, BENCHMARKS / "extrapolate.py", *words]
    return subprocess.run(command, capture_output=True, text=True, env=environment())
