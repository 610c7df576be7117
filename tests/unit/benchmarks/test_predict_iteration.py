"""predict_iteration.py: a whole iteration from operator times, also on more ranks."""

import json
import subprocess
import sys

import pytest

from megatron_scmoe.analysis.simulator import OPERATORS
from tests.benchmarks import BENCHMARKS, environment

TIMES = dict.fromkeys(OPERATORS, 1.0) | {"dispatch": 2.0, "combine": 2.0}


@pytest.fixture
def times(tmp_path):
    path = tmp_path / "times.json"
    path.write_text(json.dumps({"source": "made up", "forward": TIMES, "backward": TIMES}))
    return path


def predict(times, *words: str) -> dict[str, list[str]]:
    """The cells behind each system's name."""
    done = _run(times, *words)
    assert done.returncode == 0, done.stderr
    return {line.split()[0]: line.split()[1:] for line in done.stdout.splitlines()[1:]}


def _run(times, *words: str) -> subprocess.CompletedProcess:
    return subprocess.run(
        [
            sys.executable, str(BENCHMARKS / "predict_iteration.py"), "--times", str(times),
            "--pairs", "1", "--micro-batches", "1", *words,
        ],  # fmt: skip
        capture_output=True,
        text=True,
        env=environment(),
    )


def test_serial_waits_and_top2_waits_for_twice_the_tokens(times):
    found = predict(times)
    compute = 2.0 * sum(ms for name, ms in TIMES.items() if name not in ("dispatch", "combine"))
    assert float(found["serial"][0]) == compute + 8
    assert float(found["top2"][0]) == compute + 2 * 2 + 16  # and sorts twice the rows
    assert float(found["overlapped"][0]) < compute + 8
    assert found["serial"][2] == "8.0"


def test_on_more_ranks_more_leaves_each(times):
    found = predict(times, "--ranks", "4", "--gather", "4", "--optimizer", "10")
    assert found["serial"][2] == "12.0"  # 3/4 of the tokens leave, not 1/2
    assert found["serial"][3] == "6.0"
    assert predict(times, "--ranks", "4", "--bandwidth", "1.5")["serial"][2] == "8.0"


@pytest.mark.parametrize(
    "words,message",
    [
        (["--ranks", "1"], "--ranks 1: nothing leaves it; accepted: 2 or more"),
        (["--bandwidth", "0"], "--bandwidth 0.0: accepted: above 0"),
        (["--gather", "-1"], "--gather -1.0: accepted: milliseconds"),
    ],
)
def test_what_says_nothing_is_refused(times, words, message):
    done = _run(times, *words)
    assert done.returncode != 0
    assert done.stderr.splitlines()[-1].endswith(message)
