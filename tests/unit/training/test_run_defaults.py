"""What a run chooses where a flag was not given."""

import argparse

import pytest
from megatron.training.arguments import add_megatron_arguments

from megatron_scmoe.platform import cpu_backend
from megatron_scmoe.training import run_defaults

BASE = "--seq-length 32 --mock-data".split()


def choose(*words: str) -> dict:
    parser = run_defaults.leave_open(
        add_megatron_arguments(argparse.ArgumentParser(allow_abbrev=False))
    )
    return run_defaults.choose(parser.parse_args([*BASE, *words]))


def test_what_is_chosen():
    chosen = choose()
    assert chosen["moe_token_dispatcher_type"] == "alltoall"
    assert chosen["eval_interval"] == run_defaults.INTERVAL
    assert chosen["max_position_embeddings"] == 32
    assert (chosen.get("distributed_backend") == "gloo") == cpu_backend.is_enabled()
    assert "save_interval" not in chosen
    assert choose("--save", "x")["save_interval"] == run_defaults.INTERVAL


@pytest.mark.parametrize(
    ("words", "name"),
    [
        ("--moe-token-dispatcher-type allgather", "moe_token_dispatcher_type"),
        ("--eval-interval 7", "eval_interval"),
        ("--max-position-embeddings 64", "max_position_embeddings"),
        ("--distributed-backend nccl", "distributed_backend"),
        ("--transformer-impl transformer_engine", "transformer_impl"),
        ("--no-gradient-accumulation-fusion", "gradient_accumulation_fusion"),
        ("--save x --save-interval 5", "save_interval"),
    ],
)
def test_what_is_given_stands(words, name):
    """Even where it equals Megatron's default: it was asked for, and is refused if it cannot work."""
    assert name not in choose(*words.split())


@pytest.mark.skipif(not cpu_backend.is_enabled(), reason="of the CPU")
def test_the_line_that_says_so():
    line = run_defaults.describe(choose())
    assert line.startswith("> no GPU: on the CPU over gloo; chosen where not given: ")
    for words in (
        "--distributed-backend gloo",
        "--transformer-impl local",
        "--no-gradient-accumulation-fusion",
        "--no-rope-fusion",
        "--moe-token-dispatcher-type alltoall",
    ):
        assert words in line
    assert "\n" not in line
