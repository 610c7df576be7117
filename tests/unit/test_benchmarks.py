"""The benchmarks run: a small round, its JSON, what it would be on more GPUs, and bad input."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from megatron_scmoe.platform.command_line import UsageError

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
        *("--train-micro-batches", "2"),
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
    assert set(found["hidden_share"]) == {"step", "forward", "train"}
    serial, overlapped, floor = (
        found["systems"][n]["step_ms"] for n in ("scmoe-serial", "scmoe", "floor")
    )
    expected = (serial - overlapped) / (serial - floor) if serial > floor else None
    assert found["hidden_share"]["step"] == expected
    assert [set(slot) for slot in found["slots"]] == [{"predicted_ms", "measured_ms"}] * 4
    assert found["slot"] == min(range(4), key=lambda n: found["slots"][n]["measured_ms"])
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
        ("--shape wide --slot 4", "--slot 4: with --tap pos2 accepted are 0 to 3 and auto"),
        ("--shape wide --slot -1", "--slot -1: with --tap pos2 accepted are 0 to 3 and auto"),
        ("--shape wide --slot last", "--slot: 'last': accepted are numbers and auto"),
        ("--shape wide --rounds 0", "--rounds: 0 is not a whole number above 0"),
        ("--shape wide --blocks 3", "--blocks 3: ScMoE pairs blocks; accepted: even numbers"),
        ("--shape llama2 --tap pos2", "--tap pos2: llama2 has MoE in every block; accepted: pos1"),
        ("--shape wide --systems top2 --chunks 2", "--chunks: accepted with a system of scmoe"),
        ("--shape wide --systems floor --operators", "accepted: --systems with scmoe"),
        ("--shape wide --systems floor --slot auto", "--slot auto: it measures scmoe"),
        ("--shape wide --json {tmp}/no/x.json", "--json {tmp}/no/x.json: cannot write in {tmp}/no"),
        ("--shape wide --plot {tmp}/x.svg", "accepted are names that end in .png"),
        ("--shape wide --cuda-graphs --train-rounds 1", "the optimizer moves captured weights"),
        ("--shape wide --cuda-graphs --systems top2-1f1b", "it does not run with --cuda-graphs"),
        (
            "--shape wide --train-rounds 0 --train-micro-batches 2",
            "accepted: --train-rounds above 0",
        ),
        ("--shape wide --copied dispatch", "--copied dispatch with --exchange collective: "),
        ("--shape cpu --exchange copy-host", "--exchange: there is no GPU; leave it out"),
        ("--shape cpu --copied dispatch", "--copied: there is no GPU; leave it out"),
        ("--shape cpu --ep-channels 4", "--ep-channels: there is no GPU; leave it out"),
        ("--shape cpu --systems top2-1f1b", "top2-1f1b: it does not run without a GPU"),
    ],
)
def test_what_cannot_be_measured_is_refused_in_one_line(words, message, tmp_path, capsys):
    argv = words.format(tmp=tmp_path).split()
    with pytest.raises((UsageError, SystemExit)) as refused:
        benchmark("options").parse("--shape cpu" in words, argv)
    said = str(refused.value) if refused.type is UsageError else capsys.readouterr().err
    assert message.format(tmp=tmp_path) in said
    assert said.strip().count("\n") == 0


def test_options_make_the_shape():
    parse = benchmark("options").parse
    found = parse(False, "--shape wide --slot 2 --blocks 4 --micro-batch 2 --cuda-graphs".split())
    assert (found.sizes.blocks, found.sizes.micro_batch, found.sizes.hidden) == (4, 2, 2048)
    assert found.sizes.cuda_graphs == ("attn", "mlp", "moe_router", "moe_preprocess")
    assert "top2-1f1b" not in found.systems
    copied = "--shape wide --exchange copy-host --copied combine dispatch-backward"
    assert parse(False, copied.split()).copied == ["combine", "dispatch-backward"]
    assert found.train_rounds == 0
    assert parse(False, "--shape wide".split()).train_rounds == 5
    assert parse(False, "--shape llama2 --cuda-graphs".split()).sizes.cuda_graphs == ("attn",)
    assert parse(False, "--shape wide --cuda-graphs attn".split()).sizes.cuda_graphs == ("attn",)
    early = parse(False, "--shape wide --slot 1 --cuda-graphs".split())
    assert early.sizes.cuda_graphs == ("attn", "moe_router", "moe_preprocess")


def benchmark(name: str):
    """A module of benchmarks/."""
    sys.path.insert(0, str(ROOT / "benchmarks"))
    try:
        return importlib.import_module(name)
    finally:
        sys.path.pop(0)


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
