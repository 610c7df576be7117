"""Runs in processes of their own: what comes of them, whatever becomes of them."""

import textwrap
from pathlib import Path

import pytest
from torch.distributed import DistNetworkError, HashStore

from tests.benchmarks import BENCHMARKS, benchmark

_BEGIN = f"""
import json, os, sys, time
sys.path.insert(0, {str(BENCHMARKS)!r})
from train_rank import wait_for_task
task = wait_for_task()
facts, kind, flags = task["facts"], task["kind"], task["flags"]
"""


@pytest.fixture
def ranks():
    """The only rank there is."""
    return benchmark("train_processes").Ranks(HashStore(), 0, 1)


@pytest.fixture
def script(tmp_path, monkeypatch):
    """Sets what a run executes in place of a training, once it has its task."""

    def write(text: str) -> None:
        path = tmp_path / "run.py"
        path.write_text(_BEGIN + textwrap.dedent(text))
        monkeypatch.setattr(benchmark("train_processes"), "SCRIPT", path)
        monkeypatch.setattr(benchmark("train_processes"), "POLL_S", 0.02)

    return write


def test_a_run_gives_its_facts_and_what_its_log_says(ranks, script, tmp_path):
    script("""
        print("iteration 1/ 1 | elapsed time per iteration (ms): 12.5 | lm loss: 2.5E+00 |")
        json.dump({"losses": {"1": kind}, "flags": flags}, open(facts, "w"))
    """)
    log = tmp_path / "log"
    (found,) = ranks.run(True, ["--seed", "1"], 60, log)
    assert found["losses"] == {"1": "stock"}
    assert found["flags"] == ["--seed", "1"]
    assert found["iterations"] == {"1": {"ms": 12.5, "loss": 2.5}}
    assert "12.5" in log.read_text()


def test_each_run_has_a_port_of_its_own_and_nothing_of_torchrun(ranks, script, monkeypatch):
    monkeypatch.setenv("TORCHELASTIC_ERROR_FILE", "file")
    monkeypatch.setenv("MASTER_PORT", "1")
    script("json.dump(dict(os.environ), open(facts, 'w'))")
    (found,) = ranks.run(True, [], 60, None)
    assert "TORCHELASTIC_ERROR_FILE" not in found
    assert int(found["MASTER_PORT"]) > 1


def test_the_next_run_may_start_ahead(script):
    script("json.dump({'losses': flags}, open(facts, 'w'))")
    ranks = benchmark("train_processes").Ranks(HashStore(), 0, 1, ahead=True)
    for flag in ("one", "two"):
        (found,) = ranks.run(False, [flag], 60, None)
        assert found["losses"] == [flag]
    ahead = ranks._next
    assert ahead.poll() is None
    ranks.close()
    assert ahead.poll() is not None


@pytest.mark.parametrize(
    "text,error",
    [
        ("raise ValueError('no such thing')", "ValueError: no such thing"),
        ("sys.exit('run.py: error: --tap pos9: unknown')", "--tap pos9: unknown"),
        ("sys.exit(3)", "exit status 3"),
        ("os.kill(os.getpid(), 9)", "ended by signal 9"),
        ("time.sleep(60)", "not done after 1 s"),
    ],
)
def test_a_run_that_fails_is_one_line(text, error, ranks, script):
    script(text)
    assert ranks.run(False, [], 1 if "sleep" in text else 60, None) == [{"error": error}]


def test_a_run_is_ended_when_another_rank_has_failed(ranks, script, monkeypatch):
    monkeypatch.setattr(benchmark("train_processes"), "PATIENCE_S", 0.1)
    monkeypatch.setattr(type(ranks), "_has_failed", lambda _: True)
    script("time.sleep(60)")
    assert ranks.run(False, [], 60, None) == [{"error": "another rank failed"}]


def test_it_is_one_line_if_the_process_of_another_rank_is_gone(ranks, script, tmp_path):
    class Gone:
        def get(self, *_):
            raise DistNetworkError("connection closed")

        set = get

    ranks._store = Gone()
    script(f"open({str(tmp_path / 'ran')!r}, 'w')")
    with pytest.raises(benchmark("train_processes").RankLeftError, match="another rank has ended"):
        ranks.run(True, [], 60, None)
    assert not Path(tmp_path / "ran").exists()
