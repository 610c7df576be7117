"""Upcycling: dense models of each family, made by transformers, and stock Megatron checkpoints."""

import argparse
import json
import shutil
from functools import cache
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.process_groups_config import ProcessGroupCollection
from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
from megatron.training.arguments import add_megatron_arguments
from megatron.training.models.gpt import GPTModelBuilder
from safetensors.torch import load_file, save_file

from megatron_scmoe.checkpoints.convert import megatron_to_hf
from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor
from megatron_scmoe.checkpoints.torch_dist import read_megatron
from megatron_scmoe.checkpoints.torch_dist_writer import write_megatron
from megatron_scmoe.checkpoints.upcycle import Upcycling, upcycle
from megatron_scmoe.checkpoints.vocabulary import OUTPUT_LAYER, Padding
from megatron_scmoe.errors import ConversionError
from megatron_scmoe.evaluation import perplexity
from megatron_scmoe.evaluation.sequences import Sequences
from megatron_scmoe.platform import megatron_workarounds
from megatron_scmoe.training import load_model
from tests import models
from tests.harness import run_distributed, run_pretrain
from tests.tools import REPOSITORY, TOOLS, run_tool, tool

transformers = pytest.importorskip("transformers")

VOCAB, LENGTH, BLOCKS = 301, 32, 4
TOLERANCE = 1e-4  # of logits of magnitude 1 to 10, in fp32

LLAMA = dict(
    vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=BLOCKS,
    num_attention_heads=4, num_key_value_heads=2, max_position_embeddings=64,
    bos_token_id=None, eos_token_id=None,
)  # fmt: skip
GPT2 = dict(
    vocab_size=VOCAB, n_embd=32, n_layer=BLOCKS, n_head=4, n_positions=64, bos_token_id=None,
    eos_token_id=None, attn_pdrop=0.0, resid_pdrop=0.0,
)  # fmt: skip
LLAMA3 = dict(
    rope_type="llama3", rope_theta=500000.0, factor=32.0, low_freq_factor=1.0,
    high_freq_factor=4.0, original_max_position_embeddings=8192,
)  # fmt: skip
LINEAR = dict(rope_type="linear", rope_theta=10000.0, factor=4.0)

DENSE = {
    "llama": ("Llama", LLAMA),
    "llama, heads of 16, llama3 rope": (
        "Llama",
        LLAMA | dict(head_dim=16, rope_parameters=LLAMA3, max_position_embeddings=131072),
    ),
    "llama, tied, no groups, linear rope": (
        "Llama",
        LLAMA | dict(tie_word_embeddings=True, num_key_value_heads=4, rope_parameters=LINEAR),
    ),
    "llama, with a window that only others read": ("Llama", LLAMA | dict(sliding_window=5)),
    "mistral, window of 5": ("Mistral", LLAMA | dict(sliding_window=5)),
    "qwen2": ("Qwen2", LLAMA),
    "qwen2, windows in two blocks": (
        "Qwen2",
        LLAMA | dict(use_sliding_window=True, sliding_window=5, max_window_layers=2),
    ),
    "qwen3, tied": ("Qwen3", LLAMA | dict(head_dim=16, tie_word_embeddings=True)),
    "gpt2": ("GPT2", GPT2),
    "gpt2, gelu, untied": (
        "GPT2",
        GPT2 | dict(activation_function="gelu", tie_word_embeddings=False, n_inner=48),
    ),
}


@pytest.fixture(scope="module", autouse=True)
def _one_rank():
    """Megatron's process groups of this process."""
    models.init_parallel()


@pytest.fixture(scope="module")
def folders(tmp_path_factory):
    """Makes the folder of a model in DENSE, once."""

    @cache
    def make(name: str) -> Path:
        family, settings = DENSE[name]
        torch.manual_seed(1)
        config = getattr(transformers, f"{family}Config")(**settings)
        kind = {"GPT2": "GPT2LMHeadModel"}.get(family, f"{family}ForCausalLM")
        model = getattr(transformers, kind)(config)
        for parameter in model.parameters():  # biases and norms too
            torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
        folder = tmp_path_factory.mktemp("dense")
        model.save_pretrained(folder)
        return folder

    return make


@pytest.fixture(scope="module")
def tokens():
    return np.random.default_rng(1).integers(0, VOCAB, (3, LENGTH))


def dense_logits(folder, tokens, change=None, **settings) -> np.ndarray:
    """Logits by transformers; ``change`` may put hooks into the model."""
    model = transformers.AutoModelForCausalLM.from_pretrained(folder, **settings).eval()
    if change is not None:
        change(model)
    with torch.no_grad():
        return model(torch.from_numpy(tokens)).logits.numpy()


def logits(checkpoint, tokens, **layout) -> np.ndarray:
    """Logits by Megatron on this rank's part of a layout."""
    found = load_model.Checkpoint(str(checkpoint))
    model = load_model.build_model(found, load_model.Layout(**layout))
    out = Path(checkpoint) / "logits.npy"
    sequences = Sequences.from_rows(tokens)
    perplexity.evaluate(model, sequences, found.args.vocab_size, 1, out)
    torch.distributed.barrier()
    return np.load(out)


EXPERTS = dict(num_experts=4, topk=2)


@pytest.mark.parametrize("name", DENSE)
def test_logits_are_those_of_the_dense_model(folders, tokens, tmp_path, name):
    save = tmp_path / "ckpt"
    upcycle(folders(name), save, Upcycling(**EXPERTS))
    expected = dense_logits(folders(name), tokens)
    assert expected.std() > 0.5
    np.testing.assert_allclose(logits(save, tokens), expected, atol=TOLERANCE)


EXACT = [
    dict(init="copy", combine="add"),
    dict(init="copy", combine="cg2", tap="pos3"),
    dict(init="drop", combine="cg1", expert_ffn=20),
    dict(init="drop", combine="add", topk=1),
    dict(init="noise", combine="cg2", router_norm="shared"),
    dict(init="noise", tap="pos1", every_block=True),
]


@pytest.mark.parametrize("how", EXACT, ids=str)
@pytest.mark.parametrize("name", ["llama", "gpt2"])
def test_every_init_and_combine_keeps_the_logits(folders, tokens, tmp_path, name, how):
    save = tmp_path / "ckpt"
    upcycle(folders(name), save, Upcycling(**EXPERTS | how))
    expected = dense_logits(folders(name), tokens)
    np.testing.assert_allclose(logits(save, tokens), expected, atol=TOLERANCE)


@pytest.mark.parametrize("combine", ["add", "cg1", "cg2"])
def test_routed_scale_adds_the_mlp_on_the_tap(folders, tokens, tmp_path, combine):
    """Copies are alike, and their weights add up to one: routed = scale * MLP(norm(tap))."""
    scale = 0.5
    upcycle(
        folders("llama"),
        tmp_path / "ckpt",
        Upcycling(**EXPERTS, combine=combine, routed_scale=scale),
    )

    def change(model):
        taps = {}
        layers = model.model.layers
        for dense, sparse in zip(layers[::2], layers[1::2]):
            dense.post_attention_layernorm.register_forward_pre_hook(
                lambda _, given, dense=dense: taps.__setitem__(dense, given[0])
            )

            def add_routed(mlp, given, output, dense=dense, sparse=sparse):
                t = sparse.post_attention_layernorm.forward(taps[dense])
                return output + scale * mlp.down_proj(mlp.act_fn(mlp.gate_proj(t)) * mlp.up_proj(t))

            sparse.mlp.register_forward_hook(add_routed)

    expected = dense_logits(folders("llama"), tokens, change)
    assert np.abs(expected - dense_logits(folders("llama"), tokens)).max() > 0.1
    np.testing.assert_allclose(logits(tmp_path / "ckpt", tokens), expected, atol=TOLERANCE)


LAYOUTS = [
    ("llama", dict(expert=2)),
    ("llama", dict(pipeline=2)),
    ("qwen2", dict(tensor=2)),
    ("gpt2", dict(tensor=2)),
    ("gpt2", dict(expert=2)),
]


@pytest.mark.parametrize("name, layout", LAYOUTS, ids=str)
def test_loads_on_layouts(folders, tokens, tmp_path, name, layout):
    save = tmp_path / "ckpt"
    upcycle(folders(name), save, Upcycling(**EXPERTS))
    found, _ = run_distributed(logits, 2, str(save), tokens, **layout)
    np.testing.assert_allclose(found, dense_logits(folders(name), tokens), atol=TOLERANCE)


@pytest.mark.parametrize("name", ["qwen3, tied", "gpt2", "gpt2, gelu, untied"])
def test_goes_on_to_hugging_face(folders, tokens, tmp_path, name):
    """Upcycled, then exported: the modelling code of ScMoE gives the dense model's logits."""
    upcycle(folders(name), tmp_path / "ckpt", Upcycling(**EXPERTS))
    megatron_to_hf(tmp_path / "ckpt", tmp_path / "hf")
    found = dense_logits(tmp_path / "hf", tokens, trust_remote_code=True)[..., :VOCAB]
    np.testing.assert_allclose(found, dense_logits(folders(name), tokens), atol=TOLERANCE)


def experts_of(checkpoint, block=1) -> dict[str, torch.Tensor]:
    tensors = read_megatron(checkpoint).tensors
    prefix = f"decoder.layers.{block}.mlp."
    return {k.removeprefix(prefix): t.load() for k, t in tensors.items() if k.startswith(prefix)}


def test_inits(folders, tmp_path):
    """What each makes of the up-projections; experts of 20 of 48 dimensions wrap around."""

    def made(init, **more):
        save = tmp_path / f"{init}{len(list(tmp_path.iterdir()))}"
        upcycle(folders("llama"), save, Upcycling(**EXPERTS, init=init, expert_ffn=20, **more))
        return experts_of(save)

    copied = made("copy")
    dense = copied["shared_experts.linear_fc1.weight"].view(2, 48, 32)
    experts = copied["experts.experts.linear_fc1.weight"].view(4, 2, 20, 32)
    for i, rows in enumerate((range(20), range(20, 40), [*range(40, 48), *range(12)])):
        assert torch.equal(experts[i], dense[:, list(rows)])
    assert not copied["experts.experts.linear_fc2.weight"].any()

    dropped = made("drop", drop_ratio=0.25)["experts.experts.linear_fc1.weight"].view(4, 2, 20, 32)
    differs = (dropped != experts).any(-1)
    assert torch.equal(differs[:, 0], differs[:, 1])  # gate and up of the same dimensions
    assert differs[:, 0].sum(1).tolist() == [5] * 4
    assert len({tuple(row.tolist()) for row in differs[:, 0]}) == 4  # others in each expert
    fresh = dropped[differs]
    assert fresh.std() == pytest.approx(experts.std().item(), rel=0.1)
    assert fresh.mean() == pytest.approx(experts.mean().item(), abs=0.05)

    noisy = made("noise", noise_scale=0.1)["experts.experts.linear_fc1.weight"].view(4, 2, 20, 32)
    assert (noisy - experts).std() == pytest.approx(0.1 * experts.std().item(), rel=0.1)

    again, other = made("drop", drop_ratio=0.25), made("drop", drop_ratio=0.25, seed=2)
    assert torch.equal(again["experts.experts.linear_fc1.weight"].view_as(dropped), dropped)
    assert not torch.equal(other["router.weight"], again["router.weight"])


def test_dtype_is_cast(folders, tokens, tmp_path):
    upcycle(folders("llama"), tmp_path / "ckpt", Upcycling(**EXPERTS, dtype=torch.bfloat16))
    checkpoint = read_megatron(tmp_path / "ckpt")
    assert {t.dtype for t in checkpoint.tensors.values()} == {torch.bfloat16}
    assert checkpoint.args.bf16
    expected = dense_logits(folders("llama"), tokens)
    error = np.abs(logits(tmp_path / "ckpt", tokens) - expected)
    assert error.mean() < 0.02 * np.abs(expected).max()  # eight bits of mantissa


@pytest.fixture(scope="module")
def corpus(folders, tmp_path_factory):
    """A folder with a real tokenizer, text, and the dataset Megatron reads."""
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers, trainers

    folder = tmp_path_factory.mktemp("corpus")
    shutil.copytree(folders("gpt2"), folder / "model")
    # Nobody edits it: which experts see tokens hangs on the text.
    text = (REPOSITORY / "LICENSE").read_text()
    (folder / "text.txt").write_text(text)
    bpe = Tokenizer(models.BPE())
    bpe.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    bpe.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    trainer = trainers.BpeTrainer(
        vocab_size=VOCAB, special_tokens=["<|end|>"], initial_alphabet=alphabet, show_progress=False
    )
    bpe.train_from_iterator([text], trainer)
    transformers.PreTrainedTokenizerFast(tokenizer_object=bpe, eos_token="<|end|>").save_pretrained(
        folder / "model"
    )
    run_tool(
        "preprocess_data",
        *("--input", folder / "text.txt", "--tokenizer-type", "HuggingFaceTokenizer"),
        *("--tokenizer-model", folder / "model", "--output-prefix", folder / "text"),
        "--append-eod",
    )
    return folder


def train(corpus, load, iterations: int, world_size: int, *flags):
    """Train an upcycled model on the corpus, with --use-checkpoint-args alone for the model."""
    run = run_pretrain(training_flags(corpus, load, iterations, *flags), world_size)
    assert run.status == 0, run.output[-3000:]
    return run


def training_flags(corpus, load, iterations: int, *flags) -> list[str]:
    return [
        "--use-checkpoint-args",
        *("--seq-length", str(LENGTH), "--data-path", str(corpus / "text_text_document")),
        *("--split", "100,0,0", "--transformer-impl", "local", "--num-workers", "0"),
        *("--distributed-backend", "gloo", "--micro-batch-size", "2"),
        *("--global-batch-size", "8", "--train-iters", str(iterations), "--lr", "1e-3"),
        *("--eval-interval", "100", "--eval-iters", "0", "--log-interval", "1"),
        *("--lr-decay-style", "constant", "--moe-aux-loss-coeff", "0", "--weight-decay", "0"),
        *("--moe-token-dispatcher-type", "alltoall", "--load", str(load), *map(str, flags)),
    ]


def test_gradient_of_the_shared_experts_bias(folders, tokens, tmp_path):
    """GPT-2's shared expert has biases here, which Megatron's has not."""
    how = Upcycling(**EXPERTS, combine="add", routed_scale=0.5)
    upcycle(folders("gpt2"), tmp_path / "ckpt", how)
    save = str(tmp_path / "ckpt")
    alone = bias_gradient(save, tokens)
    (split, _) = run_distributed(bias_gradient, 2, save, tokens, tensor=2)
    assert np.abs(alone).max() > 1e-3
    np.testing.assert_allclose(split, alone, atol=1e-6)
    # The bias is added to the block's output for each token: by finite differences of the loss.
    step = 0.05
    direction = alone / np.linalg.norm(alone)
    losses = [bias_gradient(save, tokens, shift=sign * step * direction) for sign in (1, -1)]
    slope = (losses[0] - losses[1]) / (2 * step)
    assert slope == pytest.approx(np.linalg.norm(alone), rel=0.02)


def bias_gradient(save, tokens, shift=None, **layout):
    """Of the mean loss; or that loss, with the bias shifted."""
    found = load_model.Checkpoint(save)
    model = load_model.build_model(found, load_model.Layout(**layout))
    bias = model.decoder.layers[1].mlp.shared_experts.linear_fc2.bias
    if shift is not None:
        bias.data += torch.from_numpy(shift)
    ids = torch.from_numpy(tokens)
    loss = models.forward(model, ids[:, :-2].contiguous(), ids[:, 1:-1].contiguous()).mean()
    if shift is not None:
        return loss.item()
    loss.backward()
    if layout:
        assert bias.sequence_parallel  # by which Megatron sums it over the ranks
        torch.distributed.all_reduce(bias.grad)
    return bias.grad.numpy()


def test_trains_from_the_loss_of_the_dense_model(corpus, tmp_path, capsys):
    """And training moves the router, and the experts apart."""
    save = tmp_path / "ckpt"
    run_tool(
        "convert", "upcycle", *("--input", corpus / "model", "--save", save),
        *("--num-experts", 4, "--topk", 2, "--init", "drop"),
    )  # fmt: skip
    losses = []
    for source in (("--load", save), ("--hf", corpus / "model")):
        capsys.readouterr()
        run_tool("evaluate", *source, "--text", corpus / "text.txt", "--sequence-length", LENGTH)
        losses.append(float(capsys.readouterr().out.split()[1]))
    assert losses[0] == pytest.approx(losses[1], abs=1e-5)

    layout = ("--expert-model-parallel-size", "2")
    run = train(corpus, save, 6, 2, *layout, "--save", tmp_path / "trained", "--save-interval", 6)
    assert run.losses[6] < run.losses[1]
    before, after = experts_of(save), experts_of(tmp_path / "trained")
    down = after["experts.experts.linear_fc2.weight"]
    assert (down.flatten(1).abs().sum(1) > 0).all()
    assert all(not torch.equal(down[0], other) for other in down[1:])
    assert not torch.equal(after["router.weight"], before["router.weight"])


def test_an_odd_vocabulary_is_shared_by_ranks_in_training(corpus, tmp_path):
    """301 tokens; the checkpoint's rows are those that Megatron counts for two ranks itself."""
    save = tmp_path / "ckpt"
    upcycle(corpus / "model", save, Upcycling(**EXPERTS, padding=Padding(100, 2)))
    args = read_megatron(save).args
    assert (args.vocab_size, args.padded_vocab_size) == (VOCAB, 400)
    expected = train(corpus, save, 1, 1).losses[1]
    layout = ("--tensor-model-parallel-size", 2, "--sequence-parallel")
    layout += ("--expert-tensor-parallel-size", 1)
    assert train(corpus, save, 1, 2, *layout).losses[1] == pytest.approx(expected, abs=2e-6)
    given = argparse.Namespace(
        make_vocab_size_divisible_by=100, tensor_model_parallel_size=2, rank=1
    )
    assert vocab_size_with_padding(VOCAB, given) == 400


STOCK = f"""
    --num-layers {BLOCKS} --hidden-size 32 --num-attention-heads 4 --ffn-hidden-size 48
    --seq-length {LENGTH} --max-position-embeddings {LENGTH} --position-embedding-type rope
    --swiglu --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-4
    --untie-embeddings-and-output-weights --attention-dropout 0 --hidden-dropout 0
    --tokenizer-type NullTokenizer --vocab-size {VOCAB} --transformer-impl local
    --no-persist-layer-norm
    --num-experts 4 --moe-layer-freq [0,1]*2 --moe-router-topk 2 --moe-ffn-hidden-size 24
    --moe-token-dispatcher-type alltoall
""".split()
DENSE_STOCK = STOCK[: STOCK.index("--num-experts")]
SHARED = ["--moe-shared-expert-intermediate-size", "40"]


def save_stock(folder: Path, flags: list[str], routed_scale=1.0, **run) -> None:
    """A stock Megatron GPT with random weights, saved by Megatron; by a run with such arguments."""
    torch.manual_seed(2)
    args = add_megatron_arguments(argparse.ArgumentParser()).parse_args(flags)
    args.params_dtype, args.padded_vocab_size, args.kv_channels = torch.float32, 384, 8
    args.expert_tensor_parallel_size = 1
    megatron_workarounds.leave_out_missing_fusions(args)
    config = megatron_workarounds.transformer_config(args)
    groups = ProcessGroupCollection.use_mpu_process_groups()
    model = GPTModelBuilder(megatron_workarounds.gpt_config(args, config)).build_model(groups)
    for name, parameter in model.named_parameters():
        torch.nn.init.normal_(parameter, mean=float(parameter.dim() == 1), std=0.3)
        if ".experts." in name and "linear_fc2" in name:
            parameter.data *= routed_scale
    metadata = models.checkpoint_metadata()
    if not args.num_experts:  # Megatron stacks equal blocks
        del metadata["non_homogeneous_layers"]
    state = model.sharded_state_dict(metadata=metadata)
    step = folder / "iter_0000007"
    step.mkdir(parents=True)
    dist_checkpointing.save(
        {
            **state,
            "args": argparse.Namespace(**vars(args) | run),
            "iteration": 7,
            "checkpoint_version": 3.0,
        },
        str(step),
        content_metadata={name: value for name, value in metadata.items() if value is True},
    )
    (folder / "latest_checkpointed_iteration.txt").write_text("7")


WITH_BIASES = [flag for flag in DENSE_STOCK if flag not in ("--swiglu", "--disable-bias-linear")]
DENSE_STOCKS = {
    "swiglu": DENSE_STOCK,
    "gelu, fused with its bias": WITH_BIASES,
    "gelu": [*WITH_BIASES, "--no-bias-gelu-fusion"],
}


@pytest.mark.parametrize("combine", ["add", "cg1"])
@pytest.mark.parametrize("name", DENSE_STOCKS)
def test_stock_dense_checkpoint(tokens, tmp_path, name, combine):
    save_stock(tmp_path / "stock", DENSE_STOCKS[name])
    upcycle(tmp_path / "stock", tmp_path / "ckpt", Upcycling(**EXPERTS, combine=combine))
    expected = logits(tmp_path / "stock", tokens)
    np.testing.assert_allclose(logits(tmp_path / "ckpt", tokens), expected, atol=TOLERANCE)


@pytest.fixture(scope="module")
def stock_moe(tmp_path_factory):
    """Checkpoints of stock MoE models with shared experts; "silent": its routed output is zero."""
    folder = tmp_path_factory.mktemp("stock")
    save_stock(folder / "stock", [*STOCK, *SHARED])
    save_stock(folder / "silent", [*STOCK, *SHARED], 0.0)
    return folder


@pytest.mark.parametrize("combine", ["add", "cg1", "cg2"])
def test_stock_moe_checkpoint(stock_moe, tokens, tmp_path, combine):
    """All is kept; with a routed output of zero the logits are, whatever the tap."""
    for name in ("stock", "silent"):
        upcycle(stock_moe / name, tmp_path / f"{name} ckpt", Upcycling(combine=combine))
    before = read_megatron(stock_moe / "stock").tensors
    after = read_megatron(tmp_path / "stock ckpt").tensors
    added = {
        f"decoder.layers.{i}.mlp.{name}"
        for i in (1, 3)
        for name in (
            "shortcut_layernorm.weight",
            *{"cg1": ["shared_experts.gate_weight"], "cg2": ["combine_gate.weight"]}.get(
                combine, ()
            ),
        )
    }
    assert after.keys() - before.keys() == added
    doubled = {"add": (), "cg1": (".shared_",), "cg2": (".shared_", ".experts.experts.")}[combine]
    for name, tensor in before.items():
        factor = 2 if "linear_fc2" in name and any(part in name for part in doubled) else 1
        assert torch.equal(after[name].load(), factor * tensor.load()), name
    norm = after["decoder.layers.1.pre_mlp_layernorm.weight"].load()
    assert torch.equal(after["decoder.layers.1.mlp.shortcut_layernorm.weight"].load(), norm)

    expected = logits(stock_moe / "silent", tokens)
    found = logits(tmp_path / "silent ckpt", tokens)
    np.testing.assert_allclose(found, expected, atol=TOLERANCE)
    changed = logits(tmp_path / "stock ckpt", tokens) - logits(stock_moe / "stock", tokens)
    assert np.abs(changed).max() > 0.1  # the experts read another representation


RUNS = [
    dict(tensor_model_parallel_size=2, sequence_parallel=True, tp_comm_overlap=True),
    dict(pipeline_model_parallel_size=2, decoder_first_pipeline_num_layers=1),
    dict(recompute_granularity="full", recompute_method="uniform", recompute_num_layers=1),
    dict(moe_permute_fusion=True, moe_router_fusion=True, transformer_impl="transformer_engine"),
    dict(fp8="hybrid", fp8_param_gather=True, moe_router_padding_for_quantization=True),
    dict(overlap_dispatch_backward_with_experts_wgrad=True, moe_token_dispatcher_type="flex"),
    dict(fine_grained_activation_offloading=True, batch_invariant_mode=True),
]
"""Arguments of runs on a cluster, which say nothing of the model."""


@pytest.mark.parametrize("run", RUNS, ids=str)
def test_stock_checkpoint_of_any_run(stock_moe, tokens, tmp_path, run):
    save_stock(tmp_path / "stock", [*STOCK, *SHARED], 0.0, **run)
    upcycle(tmp_path / "stock", tmp_path / "ckpt", Upcycling())
    expected = logits(stock_moe / "silent", tokens)
    np.testing.assert_array_equal(logits(tmp_path / "stock", tokens), expected)
    np.testing.assert_allclose(logits(tmp_path / "ckpt", tokens), expected, atol=TOLERANCE)


def test_stock_checkpoint_that_megatron_refuses(tmp_path):
    """In one line, and no stack trace."""
    save_stock(tmp_path / "stock", [*STOCK, *SHARED], moe_expert_rank_capacity_factor=1.0)
    told = refusal(tmp_path / "stock", tmp_path / "ckpt", Upcycling())
    assert "--moe-expert-rank-capacity-factor requires" in told


def rebuild(source: Path, target: Path, change) -> Path:
    """A checkpoint with arguments and tensors changed by a function of both."""
    checkpoint = read_megatron(source)
    change(checkpoint.args, checkpoint.tensors)
    target.mkdir()
    write_megatron(target, checkpoint.args, checkpoint.tensors)
    return target


def ones(*shape) -> LazyTensor:
    return LazyTensor.full(shape, 1.0, torch.float32)


QKV_BIAS = "decoder.layers.0.self_attention.linear_qkv.bias"
CONTRADICTIONS = {
    "tied, with another output layer": (
        lambda args, t: setattr(args, "untie_embeddings_and_output_weights", False),
        "tensor output_layer.weight differs from embedding.word_embeddings.weight, and the arguments "
        "lack --untie-embeddings-and-output-weights",
    ),
    "not tied, without output layer": (
        lambda args, t: t.pop(OUTPUT_LAYER),
        "tensor output_layer.weight is missing, which the arguments ask for",
    ),
    "rows": (
        lambda args, t: setattr(args, "padded_vocab_size", 512),
        "the shape [384, 32], and [512",
    ),
    "width": (
        lambda args, t: setattr(args, "hidden_size", 64),
        "has the shape [384, 32], and [384, 64]",
    ),
    "heads": (lambda args, t: setattr(args, "num_attention_heads", 2), "linear_qkv.weight has the"),
    "dense ffn": (
        lambda args, t: setattr(args, "ffn_hidden_size", 64),
        "linear_fc1.weight has the",
    ),
    "expert ffn": (
        lambda args, t: setattr(args, "moe_ffn_hidden_size", 32),
        "experts.experts.linear",
    ),
    "shared ffn": (
        lambda args, t: setattr(args, "moe_shared_expert_intermediate_size", 8),
        "shared_experts.linear_fc1.weight has the shape",
    ),
    "experts": (
        lambda args, t: setattr(args, "num_experts", 8),
        "router.weight has the shape [4, 32]",
    ),
    "fewer blocks": (
        lambda args, t: vars(args).update(num_layers=2, moe_layer_freq=[0, 1]),
        "block 2 is there, and --num-layers is 2",
    ),
    "more blocks": (
        lambda args, t: vars(args).update(num_layers=6, moe_layer_freq=[0, 1] * 3),
        "tensor decoder.layers.4.self_attention.linear_qkv.layer_norm_weight is missing",
    ),
    "a bias": (
        lambda args, t: t.update({QKV_BIAS: ones(96)}),
        f"tensor {QKV_BIAS} is there, which the arguments do not ask for",
    ),
    "no bias": (lambda args, t: setattr(args, "add_qkv_bias", True), f"{QKV_BIAS} is missing"),
    "norms of queries": (
        lambda args, t: setattr(args, "qk_layernorm", True),
        "q_layernorm.weight is",
    ),
    "positions": (
        lambda args, t: t.update({"embedding.position_embeddings.weight": ones(32, 32)}),
        "embedding.position_embeddings.weight is there, which the arguments do not",
    ),
}


@pytest.mark.parametrize("case", CONTRADICTIONS)
def test_stock_checkpoint_whose_arguments_contradict_its_tensors(stock_moe, tmp_path, case):
    change, told = CONTRADICTIONS[case]
    source = rebuild(stock_moe / "stock", tmp_path / "changed", change)
    said = refusal(source, tmp_path / "ckpt", Upcycling())
    assert told in said and said.startswith(str(source))
    assert not (tmp_path / "ckpt").exists()


def test_stock_checkpoint_with_flags_of_all_commands(stock_moe, tmp_path):
    """A tied one holds its output layer as well; --dtype, --tokenizer and padding work as elsewhere."""

    def tie(args, tensors):
        args.untie_embeddings_and_output_weights = False
        tensors[OUTPUT_LAYER] = tensors["embedding.word_embeddings.weight"]

    source = rebuild(stock_moe / "stock", tmp_path / "tied", tie)
    how = Upcycling(dtype=torch.bfloat16, tokenizer="none", padding=Padding(64, 1))
    upcycle(source, tmp_path / "ckpt", how)
    checkpoint = read_megatron(tmp_path / "ckpt")
    args = checkpoint.args
    assert (args.tokenizer_type, args.vocab_size, args.padded_vocab_size) == (
        "NullTokenizer",
        301,
        320,
    )
    assert OUTPUT_LAYER not in checkpoint.tensors
    rows = checkpoint.tensors["embedding.word_embeddings.weight"].load()
    before = read_megatron(source).tensors["embedding.word_embeddings.weight"].load()
    assert torch.equal(rows, before[:320].bfloat16())
    assert args.bf16 and {t.dtype for t in checkpoint.tensors.values()} == {torch.bfloat16}


def test_stock_moe_checkpoint_with_gate_and_without_shared_expert(tokens, tmp_path):
    save_stock(tmp_path / "gated", [*STOCK, *SHARED, "--moe-shared-expert-gate"], 0.0)
    upcycle(tmp_path / "gated", tmp_path / "gated ckpt", Upcycling())
    assert read_megatron(tmp_path / "gated ckpt").args.scmoe_combine == "cg1"
    expected = logits(tmp_path / "gated", tokens)
    np.testing.assert_allclose(logits(tmp_path / "gated ckpt", tokens), expected, atol=TOLERANCE)

    save_stock(tmp_path / "bare", STOCK, 0.0)
    upcycle(tmp_path / "bare", tmp_path / "bare ckpt", Upcycling())
    assert read_megatron(tmp_path / "bare ckpt").args.scmoe_combine == "add"
    expected = logits(tmp_path / "bare", tokens)
    np.testing.assert_allclose(logits(tmp_path / "bare ckpt", tokens), expected, atol=TOLERANCE)


def changed_config(folder: Path, target: Path, **changes) -> Path:
    shutil.copytree(folder, target)
    config = json.loads((target / "config.json").read_text())
    (target / "config.json").write_text(json.dumps(config | changes))
    return target


CONFIG_REFUSALS = {
    "model_type": ("bert", "model_type is bert; accepted: gpt2, llama, mistral, qwen2, qwen3"),
    "hidden_act": ("gelu", "hidden_act is gelu, which Megatron-Core 0.19.2 cannot compute"),
    "attention_bias": (True, "attention_bias is True"),
    "vocab_size": (
        VOCAB + 1,
        f"weight has the shape [{VOCAB}, 32] instead of [302, 32], by",
    ),
    "num_hidden_layers": (
        2,
        "model.layers.2.input_layernorm.weight is left over, by config.json",
    ),
    "intermediate_size": (64, "model.layers.0.mlp.gate_proj.weight has the shape [48, 32]"),
    "rope_parameters": (
        dict(rope_type="yarn", rope_theta=1e4, factor=4.0),
        "rope_parameters.rope_type is yarn, which Megatron-Core 0.19.2 cannot compute; accepted: "
        "default or linear or llama3",
    ),
    "rope_parameters ": (LLAMA3 | dict(low_freq_factor=2.0), "low_freq_factor is 2.0"),
    "rope_parameters  ": (LINEAR | dict(factor=1.5), "factor is 1.5, which Megatron"),
}


@pytest.mark.parametrize("field", CONFIG_REFUSALS)
def test_refuses_configurations(folders, tmp_path, field):
    value, told = CONFIG_REFUSALS[field]
    folder = changed_config(folders("llama"), tmp_path / "model", **{field.strip(): value})
    assert told in refusal(folder, tmp_path / "ckpt", Upcycling(**EXPERTS))
    assert not (tmp_path / "ckpt").exists()


def refusal(source, save, how, force=False) -> str:
    with pytest.raises(ConversionError) as refused:
        upcycle(source, save, how, force)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_refuses_more(folders, tmp_path):
    llama = folders("llama")
    for how, told in (
        (dict(num_experts=4), "--num-experts and --topk: a dense model needs both"),
        (dict(num_experts=2, topk=3), "--num-experts 2 --topk 3: accepted"),
        (EXPERTS | dict(expert_ffn=64), "--expert-ffn 64: accepted: 1 to 48"),
        (EXPERTS | dict(drop_ratio=0.1), "--drop-ratio: it goes with --init drop only"),
        (EXPERTS | dict(every_block=True), "--every-block with --tap pos2: accepted: --tap pos1"),
        (EXPERTS | dict(tap="pos1", every_block=True, router_norm="shared"), "--scmoe-router-norm"),
    ):
        assert told in refusal(llama, tmp_path / "ckpt", Upcycling(**how))
    how = Upcycling(**EXPERTS)
    kinds = dict(layer_types=["full_attention", "sliding_attention"] * 2)
    ministral = changed_config(folders("mistral, window of 5"), tmp_path / "ministral", **kinds)
    told = refusal(ministral, tmp_path / "ckpt", how)
    assert "transformers takes it for ministral, whatever model_type mistral says" in told
    odd = tmp_path / "odd"
    shutil.copytree(llama, odd)
    weights = load_file(odd / "model.safetensors")
    del weights["model.layers.1.mlp.up_proj.weight"]
    save_file(weights, odd / "model.safetensors", metadata={"format": "pt"})
    told = refusal(odd, tmp_path / "ckpt", how)
    assert "tensor model.layers.1.mlp.up_proj.weight is missing" in told
    assert "accepted: a torch_dist checkpoint" in refusal(tmp_path, tmp_path / "ckpt", how)

    upcycle(llama, tmp_path / "ckpt", how)
    assert "exists; --force replaces it" in refusal(llama, tmp_path / "ckpt", how)
    assert "a ScMoE model already" in refusal(tmp_path / "ckpt", tmp_path / "more", how)
    upcycle(llama, tmp_path / "ckpt", how, force=True)


def test_refuses_a_tokenizer_larger_than_the_model(corpus, folders, tmp_path):
    folder = tmp_path / "model"
    shutil.copytree(folders("gpt2"), folder)
    for file in (corpus / "model").glob("tokenizer*"):
        shutil.copy(file, folder)
    tokenizer = json.loads((folder / "tokenizer.json").read_text())
    tokenizer["added_tokens"].append(
        dict(id=VOCAB, content="<more>", single_word=False, lstrip=False, rstrip=False,
             normalized=False, special=True)
    )  # fmt: skip
    (folder / "tokenizer.json").write_text(json.dumps(tokenizer))
    told = refusal(folder, tmp_path / "ckpt", Upcycling(**EXPERTS))
    assert f"its tokenizer has {VOCAB + 1} entries" in told
    assert not (TOOLS / "none").exists()
    assert tool("convert")
