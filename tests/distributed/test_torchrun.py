"""The whole screen under the real torchrun: the reason is said once, and nothing comes after it."""

import subprocess
import sys

import pytest

from tests import small_run
from tests.harness import TIMEOUT_S
from tests.tools import REPOSITORY

FLAGS = [*small_run.MODEL, *small_run.STEPS, "--mock-data", "--train-iters", "2"]


def torchrun(*words: str, restarts: int = 0, ranks: int = 2) -> tuple[int, list[str]]:
    """Exit status and lines of the screen, warnings of torchrun's own about the machine included."""
    launcher = ["-m", "torch.distributed.run", "--standalone", "--nproc-per-node", str(ranks)]
    run = subprocess.run(
        [sys.executable, *launcher, f"--max-restarts={restarts}", *words],
        cwd=REPOSITORY,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        timeout=TIMEOUT_S,
    )
    return run.returncode, run.stdout.splitlines()


def last_words(lines: list[str]) -> str:
    """The last line that is not torchrun's rule of equals signs."""
    return next(line for line in reversed(lines) if set(line) != {"="}).strip()


@pytest.mark.parametrize("how", ["all refuse", "one refuses"])
def test_refusal(how):
    status, lines = torchrun("-m", "tests.scripts.ranks", how)
    assert status != 0
    assert last_words(lines) == "ranks.py: error: --flag 1: it is odd; accepted: 2"
    assert sum("--flag 1" in line for line in lines) == 1
    assert not any("UsageError" in line for line in lines)
    assert any(line.split() == ["exitcode", ":", "2", *line.split()[3:]] for line in lines)


@pytest.mark.parametrize(
    ("how", "rank"), [("all crash", 0), ("one crashes", 1), ("one crashes, one is lost", 1)]
)
def test_crash(how, rank):
    status, lines = torchrun("-m", "tests.scripts.ranks", how)
    assert status != 0
    assert last_words(lines) == f"rank {rank}: ValueError: a bug"
    assert sum(line.endswith("ValueError: a bug") for line in lines) == 1
    assert sum('raise ValueError("a bug")' in line for line in lines) == 1
    assert not any("Connection closed" in line for line in lines)


def test_a_rank_that_is_killed_is_named():
    """It cannot say anything itself; torchrun's own words would be "Signal 9 received by PID"."""
    status, lines = torchrun("-m", "tests.scripts.ranks", "one is killed")
    assert status != 0
    assert last_words(lines).startswith("rank 1 on ")
    assert "was ended by a signal and said nothing; exitcode (above) -9: a kill" in last_words(
        lines
    )


def test_a_rank_that_ends_without_a_word_is_not_said_to_be_killed():
    status, lines = torchrun("-m", "tests.scripts.ranks", "one ends itself")
    assert status != 0
    assert not any("rank 1 on" in line for line in lines)
    assert any(line.split()[:3] == ["exitcode", ":", "3"] for line in lines)


def test_crash_before_a_restart_is_on_the_screen_too():
    _, lines = torchrun("-m", "tests.scripts.ranks", "all crash", restarts=1, ranks=1)
    assert sum("ValueError: a bug" in line for line in lines) == 2
    assert last_words(lines) == "rank 0: ValueError: a bug"


def test_a_run_that_ends_well_says_nothing_of_itself():
    status, lines = torchrun("-m", "tests.scripts.ranks", "none")
    assert status == 0
    told = sorted(line for line in lines if "rank" in line)
    assert told == ["rank 0 has begun", "rank 1 has begun"]


def test_refused_start_of_a_run():
    """Whole screen: what the run chose, torchrun's report, the reason."""
    status, lines = torchrun("pretrain_gpt_scmoe.py", *FLAGS, "--scmoe-expert-slot", "9")
    assert status != 0
    assert last_words(lines).startswith("pretrain_gpt_scmoe.py: error: --scmoe-expert-slot 9: ")
    assert sum("--scmoe-expert-slot 9" in line for line in lines) == 1
    own = [line for line in lines if not line.startswith((" ", "-", "="))]
    own = own[: next(i for i, line in enumerate(own) if "torch/distributed/elastic" in line)]
    assert [line[:9] for line in own if "OMP_NUM_THREADS" not in line] in (
        ["> no GPU:"],
        ["> chosen "],
    )
