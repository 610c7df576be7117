"""Runs on two GPUs that say whether they overlap: figures of CUDA events."""

import re

import pytest

from tests.gpu.rank_sets import EXACT_ONE_QUEUE
from tests.gpu.test_gpu import (
    EP2,
    FLAGS,
    ROUTING,
    pytestmark,  # noqa: F401  (skips this module too)
    requires_multi_gpu,
    trained,
)
from tests.harness import run_pretrain

GRAPHS = f"--te-rng-tracker --cuda-graph-impl transformer_engine --cuda-graph-modules {ROUTING}"
SAMPLED = ("--train-iters", "8", "--scmoe-log-overlap-interval", "2")  # graphs follow iteration 3
NEVER = ("--train-iters", "8", "--scmoe-log-overlap-interval", "0")
LINE = re.compile(
    r"overlap of iteration +(\d+) \| all-to-alls \(ms\): ([\d.]+) \| hidden: ([\d.]+)%.* \| "
    r"exposed \(ms\): ([\d.]+), .*\| exposed of forward and backward: ([\d.]+)% \| "
    r"host lead \(ms\): (-?[\d.]+), late at (\d+)% of waits \| tokens per expert, max/mean: "
    r"([\d.]+) \(layer \d\) \| gate: ([\d.]+) \|"
)


@requires_multi_gpu
@pytest.mark.parametrize("flags", ["--scmoe-chunks 2", GRAPHS], ids=["chunks", "captured"])
def test_sampled_run_has_figures_and_the_same_bits(flags):
    flags = [*EP2.split(), *flags.split()]
    run = trained(*flags, *SAMPLED, world_size=2)
    lines = LINE.findall(run.output)
    print(*lines, sep="\n")
    assert [int(line[0]) for line in lines] == [3, 5, 7]
    for _, whole, hidden, exposed, share, lead, late, load, gate in (
        map(float, line) for line in lines
    ):
        assert whole > 0
        assert 0 <= exposed <= whole + 0.1
        assert 0 <= hidden <= 100
        assert 0 <= share <= 100
        assert -0.1 < lead < 1000
        assert 0 <= late <= 100
        assert 1 <= load <= 8
        assert 0 < gate < 1
    assert run.losses == trained(*flags, *NEVER, world_size=2).losses


@requires_multi_gpu
def test_one_hardware_queue_leaves_the_hidden_share_unknown():
    run = run_pretrain([*FLAGS, *EP2.split(), *SAMPLED], 2, environment=EXACT_ONE_QUEUE)
    assert run.status == 0, run.output[-2000:]
    assert run.output.count("hidden: not known with CUDA_DEVICE_MAX_CONNECTIONS=1 | exposed") == 3
