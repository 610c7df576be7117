"""The benchmarks run: a small round, its JSON, what it would be on more GPUs, and bad input."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
SYSTEMS = ["top2", "shared", "scmoe-serial", "scmoe", "floor"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The JSON of one short run on two gloo ranks, by path."""
    path = tmp_path_factory.mktemp("benchmark") / "result.json"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
        *(ROOT / "benchmarks/step_time.py", "--shape", "cpu", "--blocks", "2"),
        *("--micro-batch", "1", "--rounds", "1", "--warmup", "1", "--train-rounds", "1"),
        *("--chunks", "2", "--slot", "auto", "--systems", *SYSTEMS),
        *("--json", path, "--plot", path.with_suffix(".png")),
    ]
    run = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment()
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return path


def environment() -> dict[str, str]:
    return os.environ | {"PYTHONPATH": str(ROOT), "OMP_NUM_THREADS": "1"}


def test_the_result_holds_every_system_and_what_it_was_measured_on(result):
    found = json.loads(result.read_text())
    assert list(found["systems"]) == SYSTEMS
    for row in found["systems"].values():
        assert row["step_ms"] > row["forward_ms"] > 0
        assert row["train_ms"] > 0
        assert row["tokens_per_s"] == pytest.approx(2 * 128 * 1e3 / row["train_ms"])
    assert found["world_size"] == 2
    assert found["sizes"]["blocks"] == 2
    assert found["slot"] in range(4)
    assert set(found["hidden_share"]) == {"step", "forward"}
    serial, overlapped, floor = (
        found["systems"][n]["step_ms"] for n in ("scmoe-serial", "scmoe", "floor")
    )
    assert found["hidden_share"]["step"] == (serial - overlapped) / (serial - floor)
    assert result.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_extrapolated_to_as_many_gpus_it_stays_as_measured(result):
    same = extrapolate(result, "--gpus", "2")
    systems = json.loads(result.read_text())["systems"]
    for name in SYSTEMS:
        assert float(same[name][0]) == pytest.approx(systems[name]["step_ms"], abs=0.06)


def test_extrapolated_to_more_gpus_top2_waits_for_twice_the_tokens(result):
    more = extrapolate(result, "--gpus", "4")
    found = json.loads(result.read_text())
    times = found["operators"]
    moved = sum(times[d][o] for d in ("forward", "backward") for o in ("dispatch", "combine"))
    for name, volume in (("top2", 2), ("shared", 1), ("floor", 0)):
        expected = found["systems"][name]["step_ms"] + volume * moved / 2  # 3/4 instead of 1/2
        assert float(more[name][0]) == pytest.approx(expected, abs=0.06)


def extrapolate(path: Path, *words: str) -> dict[str, list[str]]:
    """The printed columns by system."""
    command = [sys.executable, ROOT / "benchmarks/extrapolate.py", path, *words]
    run = subprocess.run(command, capture_output=True, text=True, env=environment())
    assert run.returncode == 0, run.stderr[-2000:]
    return {line.split()[0]: line.split()[1:] for line in run.stdout.splitlines()[2:]}


@pytest.mark.parametrize(
    "words,message",
    [
        ([], "no script is given; accepted: --rate RATE -- SCRIPT [ARGUMENTS]"),
        (["--rate", "fast", "--", "x.py"], "--rate fast: not a rate; accepted: 400mbit, 1gbit"),
        (["--speed", "1"], "--speed: unknown; accepted: --rate RATE"),
    ],
)
def test_two_hosts_says_what_is_wrong(words, message):
    run = subprocess.run([ROOT / "benchmarks/two_hosts.sh", *words], capture_output=True, text=True)
    assert run.returncode == 2
    assert message in run.stderr


def test_two_hosts_without_tc(tmp_path):
    for tool in ("bash", "env", "ip", "dirname"):
        (tmp_path / tool).symlink_to("/bin/true" if tool == "ip" else f"/usr/bin/{tool}")
    run = subprocess.run(
        ["/usr/bin/bash", ROOT / "benchmarks/two_hosts.sh", "--", "x.py"],
        capture_output=True,
        text=True,
        env={"PATH": str(tmp_path)},
    )
    assert run.returncode == 2
    assert "tc is missing; install iproute2" in run.stderr
