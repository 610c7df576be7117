"""What an error about data recommends is typed in as it stands, and the run trains."""

import re

import pytest

from tests import harness, small_run

FLAGS = [
    *small_run.MODEL,
    *small_run.STEPS,
    *("--train-iters", "3", "--eval-iters", "1", "--eval-interval", "2"),
]


@pytest.mark.parametrize("documents", [40, 1])
def test_of_a_split(documents, tmp_path):
    flags = [*FLAGS, "--data-path", str(small_run.write_dataset(tmp_path / "text", documents))]
    refused = harness.run_pretrain(flags)
    assert refused.status == 2
    advice = re.search(r"accepted: more documents, or (--split .*)", refused.error)[1].split()
    assert ("--eval-iters" in advice) == (documents == 1)

    run = harness.run_pretrain([*flags, *advice])
    assert run.status == 0, run.output
    assert sorted(run.losses) == [1, 2, 3]
    assert ("validation loss at iteration 2" in run.output) == (documents == 40)
