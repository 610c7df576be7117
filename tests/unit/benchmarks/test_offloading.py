"""offloading.py: every mode of a small model writes the same, and what is shown of it."""

import sys
from argparse import Namespace
from dataclasses import replace
from pathlib import Path

import pytest
from megatron.core import parallel_state

from megatron_scmoe.platform.command_line import UsageError
from tests.benchmarks import benchmark
from tests.harness import run_distributed

pytestmark = pytest.mark.slow


def measured(folder: Path) -> tuple[dict, str]:
    """What is found of a small model, and the table; on this rank."""
    offloading = benchmark("offloading")
    shape = replace(offloading.SHAPES["cpu"], blocks=2)
    parallel_state.initialize_model_parallel()
    with offloading.torch.no_grad():
        options = Namespace(prompt_length=6, tokens=4, batch=1)
        found = offloading.measure_shape(shape, options, folder)
    return found, benchmark("offloading_page").printed("cpu", found)


def check(found: dict) -> None:
    """What holds wherever it was measured."""
    modes = found["modes"]
    assert list(modes) == ["resident", "blocking", "overlapped", "cached"]
    for mode, row in modes.items():
        assert row["prefill_ms"] > 0 and row["token_ms"] > 0
        if mode != "resident":
            assert row["same_output"], mode
            assert 0 < found["memory_saved"][mode] < 1
            misses = 1 - row["hit_rate"]  # one expert a token and layer
            assert row["copied_mb"] == pytest.approx(misses * found["expert_mb"])


def test_every_mode_writes_the_same(tmp_path):
    ((found, table),) = run_distributed(measured, 1, tmp_path)
    check(found)
    assert [line.split()[0] for line in table.splitlines()[2:6]] == list(found["modes"])


LENGTHS = {
    "cpu": 80,
    "cpu --tokens 4 --prompt-length 124": 124,
    "gpt2-medium gpt3-xl": 512,
    "gpt2-medium cpu --prompt-length 81": (
        "--prompt-length 81: with --tokens 48 cpu has room for 80; accepted: up to 80"
    ),
    "gpt2-medium cpu --tokens 128": (
        "--tokens 128: cpu is for 128 tokens, the prompt included; accepted: up to 127"
    ),
}


def parsed() -> dict[str, int | str]:
    """The length of the prompt by the options, or why there is none."""
    parse, found = benchmark("offloading").parse, {}
    for words in LENGTHS:
        sys.argv = ["offloading.py", "--shapes", *words.split()]
        try:
            found[words] = parse().prompt_length
        except UsageError as error:
            found[words] = str(error)
    return found


def test_the_prompt_is_as_long_as_the_result_says():
    # In a process of its own: a benchmark sets what this one would log and warn of from here on.
    assert run_distributed(parsed, 1) == [LENGTHS]
