"""Options of step_time.py: the shape they make, and what cannot be measured."""

import sys

import pytest

from megatron_scmoe.platform.command_line import UsageError
from tests.benchmarks import benchmark


def test_a_process_started_alone_says_how_it_is_started(monkeypatch):
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.setattr(sys, "argv", ["benchmarks/step_time.py", "--shape", "cpu"])
    with pytest.raises(UsageError, match="torchrun --nproc-per-node N benchmarks/step_time"):
        benchmark("launched").check_launched()


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
