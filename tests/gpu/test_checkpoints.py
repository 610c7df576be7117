"""Checkpoints of Transformer Engine: grouped experts, fused norms, extra states."""

import pytest
import torch

from megatron_scmoe.checkpoints.convert import hf_to_megatron, megatron_to_hf
from megatron_scmoe.checkpoints.store import read_megatron
from tests.gpu import test_gpu
from tests.harness import run_pretrain

pytestmark = test_gpu.pytestmark


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
