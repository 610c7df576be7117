"""A NaN on one rank ends the run on all: one line, another status, and no step of the optimizer."""

import math

import pytest
from megatron.training import get_args

from tests.distributed.test_training import DISTRIBUTED, TINY
from tests.harness import Run, run_pretrain

FLAGS = [*TINY, "--train-iters", "6"]
SAVE = ["--save-interval", "2", "--save"]
THIRD = 2
"""The iteration with a NaN: so many are done before it."""


def nan_in_loss(rank: int) -> None:
    """Of one rank, in the third iteration; and a word on each step of the optimizer."""
    _replace_forward_step(rank, lambda model, output: output * math.nan)


def nan_in_one_gradient(rank: int) -> None:
    """As above, but the loss is finite."""

    def spoil(model, output):
        router = next(p for name, p in model.named_parameters() if "router" in name)
        router.register_hook(lambda gradient: gradient * math.nan)
        return output

    _replace_forward_step(rank, spoil)


def _replace_forward_step(rank: int, spoil) -> None:
    from megatron.core.optimizer.optimizer import ChainedOptimizer

    from megatron_scmoe.training import pretrain

    plain_step, plain_forward_step = ChainedOptimizer.step, pretrain.forward_step

    def step(optimizer):
        print(f"step of rank {rank}", flush=True)
        return plain_step(optimizer)

    def forward_step(data_iterator, model, iterations=None):
        output, loss_function = plain_forward_step(data_iterator, model, iterations)
        if rank == 1 and get_args().curr_iteration == THIRD:
            output = spoil(model, output)
        return output, loss_function

    ChainedOptimizer.step = step
    pretrain.forward_step = forward_step


def assert_no_step_was_made_of_it(run: Run) -> None:
    for rank in (0, 1):
        assert run.output.count(f"step of rank {rank}") == THIRD
    assert "Traceback" not in run.output


@pytest.mark.parametrize(
    "where, message, flags",
    [
        (nan_in_loss, "found NaN in local forward loss calculation", []),
        (nan_in_one_gradient, "found NaN in local grad norm for bucket #", DISTRIBUTED),
    ],
    ids=["loss", "gradient"],
)
def test_the_run_ends_before_the_step(tmp_path, where, message, flags):
    folder = str(tmp_path)
    run = run_pretrain(
        [*FLAGS, *flags, *SAVE, folder, "--rerun-mode", "disabled"], 2, prepare=where
    )
    assert run.status == 1, run.output[-3000:]
    assert run.error.startswith("Rank 1, node ")
    assert "Unexpected result nan" in run.error
    assert f"(message='{message}" in run.error
    assert_no_step_was_made_of_it(run)
    assert (tmp_path / "latest_checkpointed_iteration.txt").read_text() == str(THIRD)


def test_by_default_the_iteration_is_repeated_first():
    run = run_pretrain(FLAGS, 2, prepare=nan_in_loss)
    assert run.status == 16, run.output[-3000:]
    assert "rejected, and again when the iteration was repeated" in run.error
    assert "Unexpected result nan on rank 1" in run.output
    assert_no_step_was_made_of_it(run)
