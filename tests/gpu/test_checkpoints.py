"""Checkpoints of Transformer Engine: grouped experts, fused norms, extra states."""

import pytest
import torch

from megatron_scmoe.checkpoints.convert import hf_to_megatron, megatron_to_hf
from megatron_scmoe.checkpoints.torch_dist import read_megatron
from tests.gpu import test_gpu
from tests.harness import run_pretrain

pytestmark = test_gpu.pytestmark


@test_gpu.requires_multi_gpu
def test_a_run_saved_while_it_trained_goes_on_with_its_optimizer_on_another_layout(tmp_path):
    flags = [*test_gpu.FLAGS, "--use-distributed-optimizer", "--train-iters", "10"]
    saved = ["--save", str(tmp_path), "--save-interval", "5", "--async-save"]
    whole = run_pretrain([*flags, *test_gpu.EP2.split(), *saved], 2)
    assert whole.status == 0, whole.output[-2000:]
    resumed = run_pretrain([*flags, "--load", str(tmp_path), "--ckpt-step", "5"], 1)
    assert resumed.status == 0, resumed.output[-2000:]
    assert sorted(resumed.losses) == [6, 7, 8, 9, 10]
    for step in resumed.losses:
        # bf16, summed in another order; with Adam's steps lost it is off by more than 0.03.
        assert resumed.losses[step] == pytest.approx(whole.losses[step], abs=0.01)


@pytest.mark.parametrize("norm", ["own", "shared"])
def test_transformer_engine_trains_on_from_a_converted_checkpoint(tmp_path, norm):
    flags = [*test_gpu.FLAGS, "--scmoe-router-norm", norm]
    saved = ["--save", str(tmp_path / "source"), "--save-interval", "30"]
    run = run_pretrain([*flags, *saved], 1)
    assert run.status == 0, run.output[-2000:]
    megatron_to_hf(tmp_path / "source", tmp_path / "hf", keep_padding=True)
    hf_to_megatron(tmp_path / "hf", tmp_path / "back")
    before, after = (read_megatron(tmp_path / name).tensors for name in ("source", "back"))
    assert before.keys() == after.keys()
    for key, tensor in before.items():
        assert torch.equal(after[key].load(), tensor.load()), key

    losses = []
    for load in (
        ["--finetune", "--load", str(tmp_path / "source")],
        ["--load", str(tmp_path / "back")],
    ):
        run = run_pretrain([*flags, *load, "--train-iters", "2", "--lr-warmup-iters", "1"], 1)
        assert run.status == 0, run.output[-2000:]
        losses.append(run.losses[1])
    assert losses[0] == losses[1]
