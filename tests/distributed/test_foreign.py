"""Training through Megatron's own pretrain() with ``--spec``, and what becomes of its checkpoint."""

import numpy as np
import pytest
import torch
from transformers import AutoModelForCausalLM

from megatron_scmoe.checkpoints import inspect
from megatron_scmoe.checkpoints.convert import megatron_to_hf
from megatron_scmoe.checkpoints.torch_dist import read_megatron
from megatron_scmoe.evaluation import perplexity
from megatron_scmoe.evaluation.sequences import Sequences
from megatron_scmoe.training import load_model
from tests import stock
from tests.distributed.test_training import NO_DROPOUT, TINY
from tests.harness import run_pretrain

FLAGS = [
    *TINY,
    *NO_DROPOUT,
    *"--moe-router-pre-softmax --moe-router-bias-update-rate 0.01 --train-iters 4".split(),
    *"--no-gradient-accumulation-fusion --no-rope-fusion --no-masked-softmax-fusion".split(),
]
SCMOE = "--scmoe-tap pos3 --scmoe-combine cg2"


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """A run of four steps, and its folder with the checkpoints of steps 2 and 4."""
    folder = tmp_path_factory.mktemp("foreign")
    run = stock.run([*FLAGS, "--save", str(folder), "--save-interval", "2"], 2, SCMOE)
    assert run.status == 0, run.output[-3000:]
    assert sorted(run.losses) == [1, 2, 3, 4]
    return run, folder


def test_log_shows_the_schedule_once(trained):
    run, _ = trained
    assert run.output.count("> schedule of a pair of blocks:") == 1
    assert "tap='pos3', combine='cg2'" in run.output
    assert "$SCMOE_ARGS is not set" not in run.output


def test_checkpoint_knows_what_it_is(trained):
    _, folder = trained
    args = read_megatron(folder).args
    assert (args.scmoe_tap, args.scmoe_combine) == ("pos3", "cg2")
    assert args.scmoe_router_norm == "own" and not args.moe_shared_expert_gate
    assert any("ScMoE GPT: tap pos3, combine cg2" in line for line in inspect.describe(folder))


def test_exported_and_evaluated(trained, tmp_path):
    _, folder = trained
    rows = np.random.default_rng(0).integers(0, 128, (2, 33))
    model = load_model.build_model(load_model.Checkpoint(str(folder)), load_model.Layout())
    sequences = Sequences.from_rows(rows)
    report = perplexity.evaluate(model, sequences, 128, 1, tmp_path / "logits.npy")
    assert 3 < report.loss < 6
    megatron_to_hf(folder, tmp_path / "hf")
    exported = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    with torch.no_grad():
        logits = exported(torch.from_numpy(sequences.tokens)).logits
    assert np.abs(np.load(tmp_path / "logits.npy") - logits.numpy()[..., :128]).max() <= 1e-4


def test_biases_move_behind_a_finalize_function_of_the_script(tmp_path):
    flags = [*FLAGS, "--expert-model-parallel-size", "1", "--exit-interval", "1"]
    biased = f"{SCMOE} --scmoe-expert-bias sign"
    save = ["--save", str(tmp_path), "--save-interval", "1"]
    run = stock.run([*flags, *save], 1, biased, stock.main_with_own_finalize)
    assert run.status == 0, run.output[-3000:]
    assert run.output.count("> the script's own finalize function") == 1
    bias = read_megatron(tmp_path).tensors["decoder.layers.1.mlp.router.expert_bias"].load()
    assert bias.any() and torch.allclose(bias.abs().unique(), torch.tensor([0.01]), atol=1e-6)


@pytest.mark.parametrize("way", ["the same flags", "the checkpoint's"])
def test_resume(trained, tmp_path, way):
    straight, folder = trained
    load = ["--load", str(folder), "--ckpt-step", "2"]
    if way == "the same flags":
        run = stock.run([*FLAGS, *load], 2, SCMOE)
    else:
        run = stock.run([*FLAGS, *load, "--use-checkpoint-args"], 2, "--scmoe-tap pos1")
        assert "--scmoe-tap pos1 was given, and --scmoe-tap pos3 is used" in run.output
    assert run.status == 0, run.output[-3000:]
    assert run.losses[3] == straight.losses[3]
    assert run.grad_norms[4] == straight.grad_norms[4]


@pytest.mark.parametrize("scmoe_args", [None, "--scmoe-tap pos2 --scmoe-combine cg2"])
def test_resume_with_other_flags_is_refused(trained, scmoe_args):
    _, folder = trained
    flags = [*FLAGS, "--expert-model-parallel-size", "1", "--load", str(folder)]
    run = stock.run(flags, 1, scmoe_args)
    assert run.status == 2
    assert "Traceback" not in run.output
    assert "--scmoe-tap pos2" in run.error.split(" was trained with ")[0]
    assert "--scmoe-tap pos3" in run.error.split(" was trained with ")[1]
    assert ("WARNING: $SCMOE_ARGS is not set" in run.output) == (scmoe_args is None)


def test_own_entry_point_resumes_it(trained):
    straight, folder = trained
    flags = [*FLAGS, *SCMOE.split(), "--load", str(folder), "--ckpt-step", "2"]
    run = run_pretrain(flags, 2)
    assert run.status == 0, run.output[-3000:]
    assert run.losses[3] == straight.losses[3]
    assert run.grad_norms[4] == straight.grad_norms[4]
