"""step_time.py on two gloo ranks: a short round of every system, its JSON and its picture."""

import json
import subprocess
import sys

import pytest

from tests.benchmarks import BENCHMARKS, environment, stored

SYSTEMS = ["top2", "shared", "scmoe-serial", "scmoe", "floor"]


@pytest.fixture(scope="module")
def result(tmp_path_factory):
    """The JSON of one short run on two gloo ranks, by path."""
    path = tmp_path_factory.mktemp("benchmark") / "result.json"
    command = [
        *(sys.executable, "-m", "torch.distributed.run", "--nproc-per-node", "2"),
        *("--rdzv-backend", "c10d", "--rdzv-endpoint", "localhost:0"),
        *(BENCHMARKS / "step_time.py", "--shape", "cpu", "--blocks", "2"),
        *("--micro-batch", "1", "--rounds", "1", "--warmup", "1", "--train-rounds", "1"),
        *("--train-micro-batches", "2"),
        *("--chunks", "2", "--slot", "auto", "--systems", *SYSTEMS),
        *("--json", path, "--plot", path.with_suffix(".png")),
    ]
    run = subprocess.run(
        [str(word) for word in command], capture_output=True, text=True, env=environment()
    )
    assert run.returncode == 0, run.stderr[-3000:]
    return path


def test_the_result_holds_every_system_and_what_it_was_measured_on(result):
    found = json.loads(result.read_text())
    assert list(found["systems"]) == SYSTEMS
    for row in found["systems"].values():
        assert all(row[key] > 0 for key in ("step_ms", "forward_ms", "train_ms"))
        assert row["tokens_per_s"] == pytest.approx(2 * 128 * 1e3 / row["train_ms"])
    assert found["world_size"] == 2
    assert found["sizes"]["blocks"] == 2
    assert found["slot"] in range(4)
    assert set(found["hidden_share"]) == {"step", "forward", "train"}
    serial, overlapped, floor = (
        found["systems"][n]["step_ms"] for n in ("scmoe-serial", "scmoe", "floor")
    )
    expected = (serial - overlapped) / (serial - floor) if serial > floor else None
    assert found["hidden_share"]["step"] == expected
    assert [set(slot) for slot in found["slots"]] == [{"predicted_ms", "measured_ms"}] * 4
    assert found["slot"] == min(range(4), key=lambda n: found["slots"][n]["measured_ms"])
    assert result.with_suffix(".png").read_bytes().startswith(b"\x89PNG")


def test_the_result_has_the_keys_of_a_stored_one(result):
    found, before = (
        json.loads(path.read_text()) for path in (result, stored("cpu-2hosts-400mbit"))
    )
    assert list(found) == list(before)
    assert found["sizes"].keys() == before["sizes"].keys()
    for system, row in found["systems"].items():
        assert row.keys() == before["systems"][system].keys()
