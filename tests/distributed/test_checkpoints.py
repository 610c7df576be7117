"""Checkpoints of every kind of model, saved on every layout, through transformers and back."""

import json
import os
from pathlib import Path

import pytest
import torch
from transformers import AutoConfig, AutoModelForCausalLM

from megatron_scmoe.checkpoints import convert
from megatron_scmoe.checkpoints.convert import hf_to_megatron, megatron_to_hf
from megatron_scmoe.checkpoints.model_arguments import model_arguments
from megatron_scmoe.checkpoints.safetensors_folder import read_safetensors
from megatron_scmoe.checkpoints.torch_dist import read_megatron
from megatron_scmoe.checkpoints.vocabulary import Padding, set_rows
from megatron_scmoe.errors import ConversionError
from tests import checkpoints, models
from tests.distributed.test_training import NO_DROPOUT, TINY
from tests.harness import run_distributed, run_pretrain

VARIANTS = list(checkpoints.VARIANTS)
SOURCES = [name for name in checkpoints.LAYOUTS if name != "1 rank"]
ONE_RANK = ["pos2", "sigmoid, expert bias, groups"]


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """The folder of a variant's checkpoint, saved on a layout."""
    root = tmp_path_factory.mktemp("saved")
    done = set()

    def folder(layout: str, variant: str) -> Path:
        if layout not in done:
            variants = ONE_RANK if layout == "1 rank" else VARIANTS
            ranks = checkpoints.LAYOUTS[layout][0]
            run_distributed(checkpoints.save_all, ranks, str(root / layout), layout, variants)
            done.add(layout)
        return root / layout / variant

    return folder


def load(folder: Path, **options):
    """The model of a folder as a user loads it, with the code that lies in it."""
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True, **options)
    assert type(model).__module__.startswith("transformers_modules.")
    return model.eval()


def tokens(count: int = 2) -> torch.Tensor:
    return models.batch(0, count)[0]


def assert_same_tensors(actual: dict, expected: dict) -> None:
    assert actual.keys() == expected.keys()
    for key, tensor in expected.items():
        values = tensor.load()
        assert actual[key].dtype == values.dtype, key
        assert torch.equal(actual[key].load(), values), key


@pytest.mark.parametrize(
    "layout, variant",
    [(layout, variant) for layout in SOURCES for variant in VARIANTS]
    + [("1 rank", variant) for variant in ONE_RANK],
)
def test_transformers_gives_megatrons_logits(saved, tmp_path, layout, variant):
    source = saved(layout, variant)
    megatron_to_hf(source, tmp_path / "hf")
    with torch.no_grad():
        actual = load(tmp_path / "hf")(tokens()).logits
    checkpoint = read_megatron(source)
    expected = checkpoints.megatron_logits(checkpoint.args, checkpoint.path, tokens())
    assert actual.shape == (2, models.SEQUENCE, models.VOCAB)
    assert expected.std() > 0.1  # not all alike
    assert (actual - expected[..., : models.VOCAB]).abs().max() <= 1e-4


@pytest.mark.parametrize("variant", VARIANTS)
def test_round_trip_gives_the_same_bits_and_arguments(saved, tmp_path, variant):
    source = saved("EP2", variant)
    keep = variant == "pos2"
    megatron_to_hf(source, tmp_path / "hf", max_shard_size=20_000, keep_padding=keep)
    assert len(list((tmp_path / "hf").glob("*.safetensors"))) > 3
    hf_to_megatron(tmp_path / "hf", tmp_path / "back", padding=Padding(checkpoints.ROWS))
    before, after = read_megatron(source), read_megatron(tmp_path / "back")
    padding_left_out = set_rows(before.tensors, checkpoints.ROWS if keep else models.VOCAB)
    assert_same_tensors(after.tensors, set_rows(padding_left_out, checkpoints.ROWS))
    assert model_arguments(after.args) == model_arguments(before.args)
    assert after.args.params_dtype == torch.float32
    megatron_to_hf(tmp_path / "back", tmp_path / "again", keep_padding=keep)
    assert_same_tensors(read_safetensors(tmp_path / "again"), read_safetensors(tmp_path / "hf"))
    first, second = (
        json.loads((tmp_path / n / "config.json").read_text()) for n in ("hf", "again")
    )
    assert second == first


def test_low_precision_keeps_the_bits_and_the_expert_bias(tmp_path):
    models.init_parallel()
    args = checkpoints.arguments("sigmoid, expert bias, groups", dtype=torch.bfloat16)
    checkpoints.save(args, tmp_path / "bf16")
    megatron_to_hf(tmp_path / "bf16", tmp_path / "hf", keep_padding=True)
    hf_to_megatron(tmp_path / "hf", tmp_path / "back", padding=Padding(checkpoints.ROWS))
    before, after = read_megatron(tmp_path / "bf16"), read_megatron(tmp_path / "back")
    assert_same_tensors(after.tensors, before.tensors)
    assert after.args.bf16 and after.args.params_dtype == torch.bfloat16
    model = load(tmp_path / "hf")
    assert model.dtype == torch.bfloat16
    bias = model.model.layers[1].mlp.router.expert_bias
    stored = before.tensors["decoder.layers.1.mlp.router.expert_bias"].load()
    assert bias.dtype == torch.float32 and torch.equal(bias, stored)
    with torch.no_grad():
        actual = model(tokens()).logits
    expected = checkpoints.megatron_logits(before.args, before.path, tokens())
    # Seven bits of mantissa, four blocks: a rounding may send a token to another expert.
    assert (actual - expected).abs().float().median() < 0.02


def test_dtype_casts_all_but_the_expert_bias(saved, tmp_path):
    source = saved("1 rank", "sigmoid, expert bias, groups")
    megatron_to_hf(source, tmp_path / "hf", dtype=torch.bfloat16)
    for name, tensor in read_safetensors(tmp_path / "hf").items():
        is_bias = name.endswith("expert_bias")
        assert tensor.dtype == (torch.float32 if is_bias else torch.bfloat16)
    assert (
        AutoConfig.from_pretrained(tmp_path / "hf", trust_remote_code=True).dtype == torch.bfloat16
    )
    hf_to_megatron(tmp_path / "hf", tmp_path / "back", dtype=torch.float32)
    assert read_megatron(tmp_path / "back").args.params_dtype == torch.float32


@pytest.mark.parametrize("variant", ["pos2", "GPT-2", "every block", "pos3, shared norm, CG-2"])
def test_generation_with_the_cache_is_that_without(saved, tmp_path, variant):
    megatron_to_hf(saved("EP2", variant), tmp_path / "hf")
    model = load(tmp_path / "hf")
    prompt = tokens()[:, :8]
    options = dict(max_new_tokens=8, do_sample=False, pad_token_id=0)
    cached = model.generate(prompt, **options)
    assert cached.shape == (2, 16)
    assert torch.equal(cached, model.generate(prompt, **options, use_cache=False))
    with torch.no_grad():
        whole = model(cached).logits
        assert torch.equal(whole[:, 7:-1].argmax(-1), cached[:, 8:])
        first = model(prompt, use_cache=True)
        step = model(cached[:, 8:9], past_key_values=first.past_key_values)
    assert (step.logits[:, 0] - whole[:, 8]).abs().max() <= 1e-5


def test_padding_on_the_left_changes_nothing(saved, tmp_path):
    megatron_to_hf(saved("EP2", "GPT-2"), tmp_path / "hf")
    model = load(tmp_path / "hf")
    prompt = tokens()[:1, :6]
    padded = torch.cat([torch.zeros(1, 3, dtype=torch.long), prompt], dim=1)
    mask = torch.tensor([[0] * 3 + [1] * 6])
    options = dict(max_new_tokens=5, do_sample=False, pad_token_id=0)
    expected = model.generate(prompt, **options)[:, 6:]
    assert torch.equal(model.generate(padded, attention_mask=mask, **options)[:, 9:], expected)


def test_attention_implementations_agree_and_training_works(saved, tmp_path):
    megatron_to_hf(saved("EP2", "squared ReLU, QK norm, wide heads"), tmp_path / "hf")
    sdpa = load(tmp_path / "hf")
    eager = load(tmp_path / "hf", attn_implementation="eager")
    assert sdpa.config._attn_implementation == "sdpa"
    with torch.no_grad():
        outputs = eager(tokens(), output_attentions=True, output_hidden_states=True)
        assert (sdpa(tokens()).logits - outputs.logits).abs().max() <= 1e-5
    assert len(outputs.attentions) == 4 and len(outputs.hidden_states) == 5
    eager.train()
    eager.activation_checkpointing_enable()
    eager(tokens(), labels=tokens()).loss.backward()
    without = [name for name, p in eager.named_parameters() if p.grad is None]
    assert all(".experts." in name for name in without)  # only experts that got no token


def test_training_goes_on_with_megatrons_gradients(saved, tmp_path, monkeypatch):
    """The router's: of the cross entropy, and of the auxiliary loss with the exported coefficient."""
    checkpoint = read_megatron(saved("1 rank", "pos2"))
    args = checkpoint.args
    args.moe_aux_loss_coeff = 0.5
    monkeypatch.setattr(convert, "read_megatron", lambda path: checkpoint)
    megatron_to_hf("checkpoint", tmp_path / "hf", keep_padding=True)  # as in its loss
    model = load(tmp_path / "hf", output_router_logits=True).train()
    assert model.config.router_aux_loss_coef == 0.5
    megatron = checkpoints.load(args, checkpoint.path).train()
    labels = tokens().roll(-1, dims=1)
    _, expected = models.loss_and_gradients(megatron, tokens(), labels)
    model(tokens(), labels=labels, shift_labels=labels).loss.backward()
    for layer in (1, 3):
        gradient = expected[f"decoder.layers.{layer}.mlp.router.weight"]
        assert gradient.abs().max() > 1e-2
        actual = model.model.layers[layer].mlp.router.weight.grad
        assert (actual - gradient).abs().max() <= 1e-5


def test_a_folder_saved_by_transformers_converts_too(saved, tmp_path):
    source = saved("EP2", "GPT-2")
    megatron_to_hf(source, tmp_path / "hf")
    load(tmp_path / "hf").save_pretrained(tmp_path / "saved")
    hf_to_megatron(tmp_path / "saved", tmp_path / "back")
    back, before = read_megatron(tmp_path / "back").tensors, read_megatron(source).tensors
    assert_same_tensors(set_rows(back, models.VOCAB), set_rows(before, models.VOCAB))


def test_training_goes_on_from_a_converted_checkpoint(tmp_path):
    flags = [
        *TINY,
        *NO_DROPOUT,
        *"--scmoe-tap pos3 --scmoe-combine cg2 --norm-epsilon 1e-2".split(),
    ]
    first = ["--train-iters", "2", "--save", str(tmp_path / "source"), "--save-interval", "2"]
    assert run_pretrain([*flags, *first], 2).status == 0
    megatron_to_hf(tmp_path / "source", tmp_path / "hf")
    hf_to_megatron(tmp_path / "hf", tmp_path / "back")

    def continued(flags, folder, world_size=2):
        run = run_pretrain([*flags, "--load", str(folder), "--train-iters", "2"], world_size)
        assert run.status == 0, run.output[-3000:]
        assert len(run.losses) == 2
        return run.losses

    expected = continued([*flags, "--finetune"], tmp_path / "source")
    assert continued(flags, tmp_path / "back") == expected
    # The same with the model's flags left out, and on one rank.
    of_training = [*TRAINING, "--use-checkpoint-args"]
    assert continued(of_training, tmp_path / "back", 1) == pytest.approx(expected, abs=2e-6)


def test_arguments_of_files_of_ranks_are_compared_and_restored(tmp_path):
    form = "--ckpt-format torch --train-iters 4".split()
    scmoe = "--scmoe-tap pos3 --scmoe-combine cg2".split()
    flags = [*TINY, *NO_DROPOUT, *form, "--expert-model-parallel-size", "1"]
    stop = ["--save", str(tmp_path), "--save-interval", "2", "--exit-interval", "2"]
    assert run_pretrain([*flags, *scmoe, *stop]).status == 0
    load = ["--load", str(tmp_path)]
    expected = run_pretrain([*flags, *scmoe, *load])
    assert sorted(expected.losses) == [3, 4], expected.output[-3000:]
    run = run_pretrain([*TRAINING, *form, *load, "--use-checkpoint-args"])
    assert run.losses == expected.losses, run.output[-3000:]
    refused = run_pretrain([*flags, *load])
    assert refused.status == 2
    assert refused.error.startswith("--scmoe-tap pos2, --scmoe-combine cg1: ")


TRAINING = """
    --transformer-impl local --distributed-backend gloo --seq-length 32 --micro-batch-size 2
    --global-batch-size 8 --lr 1e-2 --lr-warmup-iters 2 --lr-decay-iters 10 --log-interval 1
    --eval-iters 0 --eval-interval 100 --mock-data --num-workers 0 --moe-aux-loss-coeff 1e-2
    --moe-token-dispatcher-type alltoall --distributed-timeout-minutes 2
""".split()


REFUSED = {
    "--rotary-interleaved": {"rotary_interleaved": True},
    "--multi-latent-attention": {"multi_latent_attention": True},
    "--position-embedding-type yarn": {"position_embedding_type": "yarn"},
    "--qk-l2-norm": {"qk_l2_norm": True},
    "--window-size": {"window_size": (128, 0)},
    "--softmax-type learnable": {"softmax_type": "learnable"},
    "--attention-output-gate": {"attention_output_gate": True},
    "--activation-func-clamp-value": {"activation_func_clamp_value": 7.0},
    "--moe-latent-size": {"moe_latent_size": 8},
    "--moe-expert-capacity-factor": {"moe_expert_capacity_factor": 1.0},
    "--moe-router-load-balancing-type": {"moe_router_load_balancing_type": "sinkhorn"},
    "--moe-router-score-function": {"moe_router_score_function": "sqrtsoftplus"},
    "--num-experts": {"num_experts": None},
}


@pytest.mark.parametrize("flag", REFUSED)
def test_what_the_model_in_transformers_has_not_is_refused(saved, tmp_path, monkeypatch, flag):
    checkpoint = read_megatron(saved("1 rank", "pos2"))
    vars(checkpoint.args).update(REFUSED[flag])
    monkeypatch.setattr(convert, "read_megatron", lambda path: checkpoint)
    with pytest.raises(ConversionError) as caught:
        megatron_to_hf("checkpoint", tmp_path / "hf")
    assert f": {flag}" in str(caught.value) and "\n" not in str(caught.value)
    assert os.listdir(tmp_path) == []
