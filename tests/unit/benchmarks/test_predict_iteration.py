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
    script = str(BENCHMARKS / "predict_iteration.py")
    common = ["--times", str(times), "--pairs", "1", "--micro-batches", "1"]
    return subprocess.run(
        [sys.executable, script, *common, *words], capture_output=True, text=True, env=environment()
    )


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
