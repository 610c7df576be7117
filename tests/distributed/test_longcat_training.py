"""LongCat-Flash through the pretraining script: import, ten steps, the biases' rule, resume."""

import itertools

import pytest
import torch
from transformers import LongcatFlashForCausalLM

from megatron_scmoe.checkpoints.convert import megatron_to_hf
from megatron_scmoe.checkpoints.formats.longcat_flash import megatron_flags
from megatron_scmoe.checkpoints.torch_dist import read_megatron
from tests import longcat
from tests.harness import Run, run_pretrain

RATE = 0.05
STEPS = 10
TOKENS = 8 * 32  # a global batch
PROMPTS = torch.arange(30).view(2, 15)
LOOP = f"""
    --transformer-impl local --distributed-backend gloo --expert-model-parallel-size 2
    --seq-length 32 --micro-batch-size 2 --global-batch-size 8 --train-iters {STEPS}
    --lr 1e-2 --lr-warmup-iters 2 --lr-decay-iters 10 --log-interval 1
    --eval-iters 1 --eval-interval 4 --mock-data --tokenizer-type NullTokenizer
    --vocab-size {longcat.CONFIG["vocab_size"]} --make-vocab-size-divisible-by 1
    --num-workers 0 --distributed-timeout-minutes 2 --moe-router-bias-update-rate {RATE}
""".split()

MODEL_OF_CHECKPOINT = """
    --use-checkpoint-args --no-rope-fusion --moe-token-dispatcher-type alltoall
    --attention-dropout 0 --hidden-dropout 0
""".split()


def train(config: dict | None, *flags: str) -> Run:
    """Two ranks; without a configuration the checkpoint's arguments say what the model is."""
    model = MODEL_OF_CHECKPOINT if config is None else megatron_flags(config)
    run = run_pretrain([*model, *LOOP, *flags], 2)
    assert run.status == 0, run.output[-3000:]
    return run


@pytest.fixture(scope="module")
def trained(tmp_path_factory):
    """Configuration, imported checkpoint, and ten steps from it with every state of the model."""
    folder = tmp_path_factory.mktemp("trained")
    longcat.build("zero experts", folder / "longcat")
    longcat.import_folder(folder / "longcat", folder / "imported")
    config = longcat.load_config(folder / "longcat")
    save = ["--save", str(folder / "saved"), "--save-interval", "1"]
    run = train(config, "--load", str(folder / "imported"), *save)
    return config, folder, run


def test_training_from_an_imported_checkpoint_lowers_the_loss(trained):
    _, _, run = trained
    assert sorted(run.losses) == list(range(1, STEPS + 1))
    assert run.losses[STEPS] < run.losses[1] - 0.3


def test_biases_move_as_the_rule_says(trained):
    """db_i = mu (K_e/(K N) - T_i/(K T_all)): T_i are whole numbers, none of zero experts' biases moves.

    The numbers T_i themselves are compared with transformers' router in test_longcat.py.
    """
    config, folder, _ = trained
    experts, zero, topk = (config[k] for k in ("n_routed_experts", "zero_expert_num", "moe_topk"))
    share = 1 / (experts + zero)  # K_e / (K N) by default
    counts = set()
    for block in (1, 3):
        key = f"decoder.layers.{block}.mlp.router.expert_bias"
        biases = [read_megatron(folder / "imported").tensors[key].load().double()]
        for step in range(1, STEPS + 1):
            path = folder / "saved" / f"iter_{step:07d}"
            biases.append(read_megatron(path).tensors[key].load().double())
        for before, after in itertools.pairwise(biases):
            moved = (after - before) / RATE
            assert moved[experts:].abs().max() == 0
            tokens = (share - moved[:experts]) * topk * TOKENS
            # Biases are fp32 and of the order of 0.1: 1e-8 / RATE * 768 choices.
            assert (tokens - tokens.round()).abs().max() < 2e-3
            assert tokens.min() >= 0 and tokens.max() <= TOKENS
            counts |= {round(float(number)) for number in tokens}
    assert len(counts) > 10


def test_resume_continues_exactly(trained, tmp_path):
    _, folder, straight = trained
    (tmp_path / "iter_0000005").symlink_to(folder / "saved" / "iter_0000005")
    (tmp_path / "latest_checkpointed_iteration.txt").write_text("5")
    save = ["--save", str(tmp_path), "--save-interval", str(STEPS)]
    resumed = train(None, "--load", str(tmp_path), *save)
    assert sorted(resumed.losses) == [6, 7, 8, 9, 10]
    for iteration in resumed.losses:
        assert resumed.losses[iteration] == straight.losses[iteration]
    ends = [
        read_megatron(path / f"iter_{STEPS:07d}").tensors for path in (tmp_path, folder / "saved")
    ]
    assert ends[0].keys() == ends[1].keys()
    for key in ends[0]:
        assert ends[0][key].load().equal(ends[1][key].load()), key


def test_what_was_trained_loads_in_transformers(trained, tmp_path):
    config, folder, _ = trained
    megatron_to_hf(folder / "saved", tmp_path / "out", model_type="longcat_flash")
    again = longcat.load_config(tmp_path / "out")
    changed = {name for name, value in config.items() if name in again and again[name] != value}
    assert changed == {"bos_token_id", "eos_token_id"}  # there is no tokenizer here
    with torch.no_grad():
        logits = LongcatFlashForCausalLM.from_pretrained(tmp_path / "out").eval()(PROMPTS).logits
    saved = longcat.megatron_logits(config, folder / "saved" / f"iter_{STEPS:07d}", PROMPTS)
    assert (logits - saved).abs().max() < 1e-4
    start = LongcatFlashForCausalLM.from_pretrained(folder / "longcat").eval()(PROMPTS).logits
    assert (logits - start).abs().max() > 0.1


def test_bf16_counts_and_moves_biases_in_fp32(trained, tmp_path):
    """Also when the expert slot is measured first: what passes then is not counted."""
    config, folder, _ = trained
    flags = ["--load", str(folder / "imported"), "--save", str(tmp_path), "--save-interval", "1"]
    larger = ["--micro-batch-size", "16", "--global-batch-size", "32"]  # bf16 counts to 256
    flags += ["--scmoe-expert-slot", "auto", "--scmoe-chunks", "2"]
    train(config, *flags, *larger, "--bf16", "--exit-interval", "1")
    key = "decoder.layers.1.mlp.router.expert_bias"
    before = read_megatron(folder / "imported").tensors[key].load().double()
    after = read_megatron(tmp_path).tensors[key].load()
    assert str(after.dtype) == "torch.float32"
    tokens = (1 / 6 - (after.double() - before)[:4] / RATE) * config["moe_topk"] * 32 * 32
    assert (tokens - tokens.round()).abs().max() < 1e-2
    assert tokens.max() > 2 * 256
