"""inference.py: its options, a measurement on two gloo ranks, its table and its section of the page."""

import json
import shlex
from dataclasses import asdict, replace

import pytest

from megatron_scmoe.platform.command_line import UsageError
from tests import models
from tests.benchmarks import benchmark
from tests.harness import run_distributed

SMALL = ["--shape", "cpu", "--blocks", "2", "--micro-batch", "2", "--rounds", "2", "--warmup", "1"]
SMALL += ["--batch-sizes", "1", "3", "--tokens", "2", "--context", "4"]


@pytest.mark.parametrize(
    "words,message",
    [
        (["--slot", "9"], "--slot 9: with --tap pos2 accepted are 0 to"),
        (["--tap", "pos1"], "--tap pos1: cpu has pairs of blocks; accepted: pos2 or pos3"),
        (["--blocks", "3"], "--blocks 3: ScMoE pairs blocks"),
        (["--json", "x.txt"], "--json x.txt: accepted are names that end in .json"),
    ],
)
def test_what_cannot_be_measured_is_refused(words, message):
    with pytest.raises(UsageError, match=message):
        benchmark("inference_options").parse(["--shape", "cpu", *words])


def test_experts_are_shared_by_the_ranks(monkeypatch):
    monkeypatch.setenv("WORLD_SIZE", "3")
    with pytest.raises(UsageError, match="3 ranks cannot share 8 experts"):
        benchmark("inference_options").parse(["--shape", "cpu"])


@pytest.mark.slow
def test_two_ranks_measure_every_system():
    for found in run_distributed(_measure, 2):
        systems, finite = found
        assert list(systems) == ["top2", "shared", "scmoe-serial", "scmoe"]
        for row in systems.values():
            decodes = {f"decode_{kind}_ms" for kind in ("1", "3", "1_padded", "3_padded")}
            assert set(row) == {"prefill_ms", "quartiles"} | decodes
            assert all(row[key] > 0 for key in row if key != "quartiles")
        assert finite


def _measure() -> tuple[dict, bool]:
    import torch
    from megatron.core.inference.utils import InferenceMode

    models.init_parallel(2, ep=2)
    inference = benchmark("inference")
    options = inference.parse(SMALL)
    options.sizes = replace(options.sizes, hidden=64, sequence=8, vocab=64)
    scmoe = inference.ScMoEConfig(tap="pos2", combine="add")
    built = inference.build_all(options.systems, options.sizes, scmoe)
    with torch.no_grad(), InferenceMode.active():
        systems = inference.measure(built, scmoe, options)
        sequences = inference._Sequences(built["scmoe"].eval(), 2, 8)
        tokens = torch.arange(6).reshape(2, 3)
        chosen = sequences.read(sequences.read(tokens))
    return systems, bool(((chosen >= 0) & (chosen < 64)).all())


def result() -> dict:
    """A JSON; ScMoE takes half as long as stock."""
    keys = ("prefill_ms", "decode_1_ms", "decode_8_ms")
    shape = benchmark("shapes").SHAPES["cpu"]
    return {
        "benchmark": "inference", "shape": "cpu", "sizes": asdict(shape), "batch_sizes": [1, 8],
        "context": 16, "tokens": 4, "rounds": 5, "warmup": 2, "tap": "pos2", "slot": 1,
        "environment": {}, "versions": {}, "link": "gloo, two hosts at 400mbit", "device": "cpu",
        "world_size": 2, "date": "2026-11-27",
        "systems": {
            "top2": dict.fromkeys(keys, 8.0),
            "shared": dict.fromkeys(keys, 6.0),
            "scmoe-serial": dict.fromkeys(keys, 5.0),
            "scmoe": dict.fromkeys(keys, 4.0),
        },
    }  # fmt: skip


def test_the_table_and_the_page_compare_with_each_other_system(tmp_path):
    page = benchmark("inference_page")
    line = page.inference_table(result()).splitlines()[-1]
    assert line.split() == ["scmoe", *["4.00", "2.000x"] * 3]
    (tmp_path / "small.json").write_text(json.dumps(result()))
    lines = "\n".join(page.inference_section({"small": result()})).splitlines()
    assert "### Inference: Small model, 4 blocks, two CPU ranks, 400 Mbit/s" in lines
    (row,) = (line for line in lines if line.startswith("| decode, 8"))
    assert row == "| decode, 8 | 8.00 | 6.00 | 5.00 | 4.00 | 2.000x | 1.500x | 1.250x |"


def test_a_decode_in_graphs_has_a_row_and_a_flag():
    found = result()
    for row in found["systems"].values():
        row |= {"decode_1_graphs_ms": 1.0, "decode_8_graphs_ms": 2.0}
    page = benchmark("inference_page")
    lines = "\n".join(page.inference_section({"small": found})).splitlines()
    assert any(line.startswith("| decode, 8, in graphs | 2.00 |") for line in lines)
    assert "--graphs" in shlex.split(page.command(found).replace("\\\n", ""))
    assert "--graphs" not in page.command(result())


def test_its_command_measures_the_same():
    words = shlex.split(benchmark("inference_page").command(result()).replace("\\\n", ""))
    given = words[words.index("benchmarks/inference.py") + 1 :]
    options = benchmark("inference_options").parse(given)
    for name in ("shape", "batch_sizes", "context", "tokens", "rounds", "warmup", "tap", "slot"):
        assert getattr(options, name) == result()[name], name
    assert asdict(options.sizes) == result()["sizes"]
