"""Whole runs that say whether they overlap."""

import functools
import re

import pytest
from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

from megatron_scmoe.analysis.overlap_report import MUCH_EXPOSED
from tests.distributed.test_training import NO_DROPOUT, TINY
from tests.harness import run_pretrain

LINE = re.compile(
    r"^ overlap of iteration +(\d+) \| all-to-alls \(ms\): ([\d.]+) \| hidden: ([\d.]+)%(.*?) \| "
    r"exposed \(ms\): ([\d.]+), forward ([\d.]+), backward ([\d.]+), most on a rank ([\d.]+) \| "
    r"exposed of forward and backward: ([\d.]+)% \| "
    r"tokens per expert, max/mean: ([\d.]+) \(layer 2\) \| gate: (0\.\d+) \|"
    r"(?: zero experts: ([\d.]+)% \|)?$",
    re.MULTILINE,
)


@functools.cache
def trained(*flags: str, ranks: int = 2):
    run = run_pretrain([*TINY, *NO_DROPOUT, "--train-iters", "6", *flags], ranks)
    assert run.status == 0, run.output[-3000:]
    return run


NEVER, EVERY_SECOND = (("--scmoe-log-overlap-interval", n) for n in "02")


def test_overlapped_run_logs_figures_and_trains_to_the_same_bits(tmp_path):
    evaluated = "--eval-interval 1 --eval-iters 1 --split 90,10,0".split()
    run = trained(*EVERY_SECOND, *evaluated, "--tensorboard-dir", str(tmp_path))
    lines = LINE.findall(run.output)
    assert [int(line[0]) for line in lines] == [3, 5]
    for _, whole, hidden, serial, *exposed, share, load, gate, _ in lines:
        waited, forward, backward, most = map(float, exposed)
        assert serial == ""
        assert waited == pytest.approx(forward + backward, abs=0.11)
        assert most >= waited - 0.05
        assert 100 * (1 - waited / float(whole)) == pytest.approx(float(hidden), abs=2)
        assert 0 <= float(share) < 100  # of a long iteration on a busy machine 0.0 is shown
        assert 1 <= float(load) <= 4
        assert 0 < float(gate) < 1
    assert run.losses == trained(*NEVER).losses

    events = EventAccumulator(str(tmp_path)).Reload()
    names = {tag for tag in events.Tags()["scalars"] if tag.startswith("scmoe/")}
    assert names == {
        f"scmoe/{name}"
        for name in (
            *("hidden-share", "all-to-all-ms", "gate", "tokens-per-expert-max-over-mean"),
            *("exposed-ms", "exposed-forward-ms", "exposed-backward-ms", "exposed-ms-max"),
            "exposed-share",
        )
    }
    assert [event.step for event in events.Scalars("scmoe/hidden-share")] == [3, 5]


def test_run_that_is_never_sampled_says_nothing():
    assert "overlap of iteration" not in trained(*NEVER).output


def test_serial_run_hides_nothing_and_is_told_so_once():
    flags = "--no-scmoe-overlap --scmoe-combine cg2 --scmoe-zero-experts 4 --moe-router-topk 3"
    output = trained(*EVERY_SECOND, *flags.split(), "--moe-router-pre-softmax").output
    lines = LINE.findall(output)
    assert [line[2:4] for line in lines] == [("0.0", " (serial)")] * 2
    assert all(0 < float(line[-1]) < 100 for line in lines)
    waits_much = any(
        float(line[8]) > 100 * MUCH_EXPOSED for line in lines
    )  # a fast machine may not
    assert output.count("leave --no-scmoe-overlap out") == waits_much


def test_stages_of_a_pipeline_do_not_wait_for_each_other():
    layout = "--pipeline-model-parallel-size 2 --expert-model-parallel-size 1 --num-layers 4"
    recompute = "--recompute-granularity full --recompute-method uniform --recompute-num-layers 2"
    run = trained(*EVERY_SECOND, *layout.split(), "--moe-layer-freq", "[0,1]*2", *recompute.split())
    last_stage = r"overlap of iteration +[35] \| no all-to-all \| .* \(layer 4\) \| gate: "
    assert len(re.findall(last_stage, run.output)) == 2
