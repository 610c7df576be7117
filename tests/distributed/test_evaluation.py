"""scmoe evaluate: a trained checkpoint's loss is the one training reports, on every layout."""

import argparse
import io
import os
import re
import shutil
import subprocess
import sys
from argparse import Namespace
from contextlib import redirect_stdout
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.training.arguments import add_megatron_arguments
from safetensors.torch import load_file, save_file

from megatron_scmoe.arguments import add_scmoe_args
from megatron_scmoe.checkpoints.dcp_metadata import read_metadata
from megatron_scmoe.checkpoints.torch_dist import read_megatron
from megatron_scmoe.checkpoints.torch_dist_writer import write_megatron
from megatron_scmoe.errors import ScMoEError
from megatron_scmoe.evaluation import perplexity
from megatron_scmoe.evaluation.sequences import Sequences, logits_file
from tests import models
from tests.harness import run_distributed, run_pretrain
from tests.tools import REPOSITORY, TOOLS, run_tool, tool

LENGTH, ROWS, VOCAB = 32, 7, 360

MODEL = f"""
    --transformer-impl local --distributed-backend gloo --num-layers 4
    --hidden-size 32 --num-attention-heads 4 --group-query-attention --num-query-groups 2
    --ffn-hidden-size 48 --seq-length {LENGTH} --max-position-embeddings {LENGTH}
    --swiglu --disable-bias-linear --normalization RMSNorm --norm-epsilon 1e-3 --qk-layernorm
    --position-embedding-type rope --untie-embeddings-and-output-weights
    --attention-dropout 0.1 --hidden-dropout 0.1 --micro-batch-size 1 --global-batch-size 8
    --lr 1e-2 --lr-decay-iters 10 --log-interval 1 --num-workers 0 --train-iters 4
    --full-validation --multiple-validation-sets --eval-iters 1 --eval-interval 4
    --eval-global-batch-size 1 --eval-micro-batch-size 1 --distributed-timeout-minutes 2
""".split()
SCMOE = """
    --num-experts 4 --moe-layer-freq [0,1]*2 --moe-ffn-hidden-size 48 --moe-router-topk 2
    --moe-shared-expert-intermediate-size 48 --moe-token-dispatcher-type alltoall
    --scmoe-tap pos3 --scmoe-combine cg2 --scmoe-post-norm
""".split()


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    """A tokenizer, training data, and held-out text of exactly ROWS sequences and one token."""
    folder = tmp_path_factory.mktemp("data")
    text = (REPOSITORY / "docs" / "architecture.md").read_text()
    (folder / "train.txt").write_text(text)
    run_tool(
        "train_tokenizer",
        *("--input", folder / "train.txt", "--vocab-size", VOCAB),
        *("--output-prefix", folder / "small"),
    )
    tokenizer = tool("preprocess_data").load_tokenizer(folder / "small.model")
    ids = tokenizer.tokenize(text)[: ROWS * LENGTH + 1]
    held_out = tokenizer.detokenize(ids)
    assert tokenizer.tokenize(held_out) == ids
    (folder / "valid.txt").write_text(held_out)
    for name in ("train", "valid"):
        run_tool(
            "preprocess_data",
            *("--input", folder / f"{name}.txt", "--tokenizer-model", folder / "small.model"),
            *("--output-prefix", folder / name),
        )
    np.save(folder / "ids.npy", np.array(ids))
    np.save(folder / "rows.npy", np.array(ids[:-1]).reshape(ROWS, LENGTH))
    return folder


def train(data, save, *flags, world_size=1):
    run = run_pretrain(
        [
            *MODEL,
            *("--tokenizer-type", "SentencePieceTokenizer"),
            *("--tokenizer-model", str(data / "small.model")),
            *("--train-data-path", str(data / "train_text_document")),
            *("--valid-data-path", str(data / "valid_text_document")),
            *("--save", str(save), "--save-interval", "4", *flags),
        ],
        world_size,
    )
    assert run.status == 0, run.output[-3000:]
    return float(re.findall(r"validation.*?lm loss value: (\S+)", run.output)[0])


@pytest.fixture(scope="module")
def trained(data, tmp_path_factory):
    """A ScMoE checkpoint saved at PP2, and the validation loss that training printed."""
    save = tmp_path_factory.mktemp("scmoe")
    loss = train(data, save, *SCMOE, "--pipeline-model-parallel-size", "2", world_size=2)
    return save, loss


def evaluate(world_size, folder, data, out, run=(), **layout) -> dict:
    reports = run_distributed(_evaluate, world_size, str(folder), str(data), str(out), layout, run)
    assert all(report == reports[0] for report in reports)
    return reports[0]


def _evaluate(folder, data, out, layout, run):
    micro_batch = 2 if layout else 1
    from megatron_scmoe.evaluation import perplexity
    from megatron_scmoe.training import load_model

    checkpoint = load_model.Checkpoint(folder)
    vars(checkpoint.args).update(run)
    model = load_model.build_model(checkpoint, load_model.Layout(**layout))
    sequences = Sequences.from_stream(np.load(f"{data}/ids.npy"), LENGTH)
    vocab_size = load_model.tokenizer_of(checkpoint).vocab_size
    report = perplexity.evaluate(model, sequences, vocab_size, micro_batch, Path(out))
    return vars(report)


@pytest.fixture(scope="module")
def alone(data, trained, tmp_path_factory):
    """Report and logits on one rank."""
    out = tmp_path_factory.mktemp("alone") / "logits.npy"
    return evaluate(1, trained[0], data, out), np.load(out)


def test_loss_is_the_validation_loss(trained, alone):
    report, logits = alone
    assert report["padded_loss"] == pytest.approx(trained[1], rel=2e-6)  # printed with 7 digits
    assert report["tokens"] == ROWS * LENGTH
    assert report["loss"] < report["padded_loss"]  # a softmax without the padding of 360 to 384
    assert logits.shape == (ROWS, LENGTH, VOCAB)
    assert logits.dtype == np.float32


def test_loss_is_that_of_the_logits(data, alone):
    report, logits = alone
    labels = torch.from_numpy(np.load(data / "ids.npy")[1:])
    losses = torch.nn.functional.cross_entropy(torch.from_numpy(logits).flatten(0, 1), labels)
    assert report["loss"] == pytest.approx(losses.item(), rel=1e-6)


@pytest.mark.parametrize("layout", [dict(tensor=2), dict(expert=2), dict(pipeline=2)], ids=str)
def test_layouts_agree(data, trained, alone, tmp_path, layout):
    report = evaluate(2, trained[0], data, tmp_path / "logits.npy", **layout)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), alone[1], atol=1e-5)
    assert report["loss"] == pytest.approx(alone[0]["loss"], abs=1e-6)
    assert [file.name for file in tmp_path.iterdir()] == ["logits.npy"]


def test_rows_of_padding_are_left_out_on_every_rank():
    """Of eight rows on two ranks, of which the second may hold no token at all."""
    for cases in run_distributed(_losses_of_tokens, 2):
        for losses, expected in cases:
            np.testing.assert_allclose(losses, expected, rtol=1e-6)


def _losses_of_tokens():
    models.init_parallel(tp=2)
    cases = []
    for tokens in (3, 4, 5, 8):
        logits = torch.randn(2, 5, 8, generator=torch.Generator().manual_seed(3))
        labels = torch.randint(tokens, (2, 5), generator=torch.Generator().manual_seed(4))
        own = logits.chunk(2, dim=-1)[torch.distributed.get_rank()]
        losses = perplexity._cross_entropy(own, labels, tokens)
        expected = torch.nn.functional.cross_entropy(
            logits[..., :tokens].flatten(0, 1), labels.flatten(), reduction="none"
        )
        cases.append((losses.flatten().numpy(), expected.numpy()))
    return cases


def kernel_flags(recipe: str) -> list[str]:
    """The flags of a recipe in examples/ that choose its kernels."""
    script = (
        f"GPUS_PER_NODE=8 EXAMPLE_DIR=examples/{recipe}; . examples/launch.sh; "
        '. "$EXAMPLE_DIR/config.sh"; set_training_flags; printf "%s\\n" "${KERNEL_FLAGS[@]}"'
    )
    run = subprocess.run(
        ["bash", "-c", script], capture_output=True, text=True, cwd=REPOSITORY, check=True
    )
    return run.stdout.split()


CHOSEN = """
    --moe-grouped-gemm --moe-permute-fusion --moe-router-fusion --cross-entropy-loss-fusion
    --no-create-attention-mask-in-dataloader --use-distributed-optimizer --overlap-grad-reduce
    --overlap-param-gather --manual-gc --manual-gc-interval 100 --te-rng-tracker
    --cuda-graph-impl transformer_engine --cuda-graph-modules attn mlp moe_router moe_preprocess
""".split()
"""What a run on GPUs chooses for speed."""

RUNS = {
    "gpt2_moe_medium": [*kernel_flags("gpt2_moe_medium"), *CHOSEN],
    "longcat_flash": [*kernel_flags("longcat_flash"), *CHOSEN],
    "other kernels": """
        --moe-router-fusion --fp8-format hybrid --fp8-param-gather --batch-invariant-mode
        --moe-router-padding-for-quantization --overlap-dispatch-backward-with-experts-wgrad
        --fine-grained-activation-offloading --offload-modules moe_act
        --transformer-impl transformer_engine
    """.split(),
    "copy engines": """
        --scmoe-exchange copy-host --scmoe-copy-engine-all-to-alls dispatch-backward
        --scmoe-expert-slot auto
        --scmoe-operator-times absent.json --scmoe-chunks 2 --transformer-impl transformer_engine
    """.split(),
}


@pytest.mark.parametrize("recipe", RUNS)
def test_checkpoints_of_any_kernels(data, trained, alone, tmp_path, recipe):
    """Trained with kernels that are not here; in fp32 all the same, to compare the logits."""
    parser = add_scmoe_args(add_megatron_arguments(argparse.ArgumentParser()))
    given, defaults = vars(parser.parse_args(RUNS[recipe])), vars(parser.parse_args([]))
    run = {name: value for name, value in given.items() if value != defaults[name]}
    assert len(run) >= 5 and given["transformer_impl"] == "transformer_engine"
    run = run | {"transformer_impl": "transformer_engine", "bf16": False}
    report = evaluate(1, trained[0], data, tmp_path / "logits.npy", run=run)
    np.testing.assert_allclose(np.load(tmp_path / "logits.npy"), alone[1], atol=1e-5)
    assert report["loss"] == pytest.approx(alone[0]["loss"], abs=1e-6)


def command(*flags, ranks=None):
    """The command line in processes of its own: a checkout's script, on ranks the program."""
    launcher = f"-m torch.distributed.run --standalone --nproc-per-node {ranks}".split()
    program = [*launcher, "-m", "megatron_scmoe.cli", "evaluate"]
    words = [*(program if ranks else [str(TOOLS / "evaluate.py")]), *map(str, flags)]
    return subprocess.run(
        [sys.executable, *words], capture_output=True, text=True, cwd=REPOSITORY, timeout=200
    )


def test_the_folder_of_an_iteration_will_do(data, trained, alone, tmp_path):
    (path,) = trained[0].glob("iter_*")
    report = evaluate(1, path, data, tmp_path / "logits.npy")
    assert report == alone[0]
    rows = ("--tokens", data / "rows.npy")
    told = refusal("--load", path, *rows, "--ckpt-step", 4)
    assert told == f"--ckpt-step 4: {path} is one iteration already; accepted: --load alone"
    shutil.copytree(path, tmp_path / "copy")
    (tmp_path / "copy" / "__0_0.distcp").unlink()
    told = refusal("--load", tmp_path / "copy", *rows)
    assert "the checkpoint is not complete: " in told and "__0_0.distcp is missing" in told


def test_text_for_a_model_without_a_tokenizer_needs_one(data, trained, tmp_path):
    checkpoint = read_megatron(trained[0])
    args = Namespace(**vars(checkpoint.args))
    args.tokenizer_type, args.tokenizer_model, args.vocab_size = "NullTokenizer", None, VOCAB
    write_megatron(tmp_path, args, checkpoint.tensors)
    text = data / "valid.txt"
    told = refusal("--load", tmp_path, "--text", text)
    assert told.startswith(f"--text {text}: the checkpoint's tokenizer is NullTokenizer")
    assert "accepted: --tokens FILE, or --tokenizer-model MODEL" in told
    flags = ["--text", str(text), "--tokenizer-model", str(data / "small.model")]
    given = run_distributed(printed, 1, "--load", str(tmp_path), *flags)
    assert given == run_distributed(printed, 1, "--load", str(trained[0]), *flags)


def printed(*flags) -> str:
    with redirect_stdout(io.StringIO()) as stream:
        run_tool("evaluate", *flags)
    return re.search(r"loss \S+ nats per token.*", stream.getvalue(), re.DOTALL)[0]


def test_command_line_under_torchrun(data, trained, alone, tmp_path):
    out = tmp_path / "logits.npy"
    run = command(
        *("--load", trained[0], "--text", data / "valid.txt", "--logits-out", out),
        *("--expert-model-parallel-size", 2, "--limit", 3, "--micro-batch", 2),
        ranks=2,
    )
    assert run.returncode == 0, run.stderr[-3000:]
    np.testing.assert_allclose(np.load(out), alone[1][:3], atol=1e-5)
    labels = torch.from_numpy(np.load(data / "ids.npy")[1 : 3 * LENGTH + 1])
    loss = torch.nn.functional.cross_entropy(
        torch.from_numpy(np.load(out)).flatten(0, 1), labels
    ).item()
    found = re.search(r"loss (\S+) nats per token, perplexity (\S+) \(96 tokens in 3 ", run.stdout)
    assert float(found[1]) == pytest.approx(loss, abs=1e-5)
    assert float(found[2]) == pytest.approx(np.exp(loss), rel=1e-4)


@pytest.fixture(scope="module")
def llama(tmp_path_factory):
    """A Llama by transformers, with random weights."""
    transformers = pytest.importorskip("transformers")
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    torch.manual_seed(1)
    model = transformers.LlamaForCausalLM(config)
    folder = tmp_path_factory.mktemp("llama")
    model.save_pretrained(folder)
    return folder, model


def test_hugging_face_folder(data, llama, tmp_path, capsys):
    folder, model = llama
    out = tmp_path / "logits.npy"
    rows = data / "rows.npy"
    flags = ["--hf", folder, "--tokens", rows, "--logits-out", out, "--micro-batch", 3]
    run_tool("evaluate", *flags)
    tokens = torch.from_numpy(np.load(rows))
    with torch.no_grad():
        expected = model(tokens, labels=tokens)
    np.testing.assert_allclose(np.load(out), expected.logits.numpy(), atol=1e-5)
    loss = float(re.search(r"loss (\S+) nats", capsys.readouterr().out)[1])
    assert loss == pytest.approx(expected.loss.item(), abs=1e-5)


@pytest.mark.parametrize(
    ("change", "told"),
    [
        (lambda tensors: tensors.pop("model.norm.weight"), "tensor model.norm.weight is missing"),
        (
            lambda tensors: tensors.update({"model.layers.0.foo.weight": torch.zeros(2)}),
            "tensor model.layers.0.foo.weight is left over, the model has none",
        ),
        (
            lambda tensors: tensors.update({"model.norm.weight": torch.zeros(3)}),
            "tensor model.norm.weight has the shape [3] instead of [32]",
        ),
    ],
    ids=["missing", "left over", "of another shape"],
)
def test_hugging_face_folder_with_other_tensors(data, llama, tmp_path, change, told):
    folder = tmp_path / "copy"
    shutil.copytree(llama[0], folder)
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})
    message = refusal("--hf", folder, "--tokens", data / "rows.npy")
    assert message.startswith(f"--hf {folder}: {told}; accepted")


@pytest.fixture(scope="module")
def gpt2(tmp_path_factory):
    """A GPT-2 by transformers, of LENGTH learned positions, with random weights."""
    transformers = pytest.importorskip("transformers")
    folder = tmp_path_factory.mktemp("gpt2")
    config = transformers.GPT2Config(
        vocab_size=VOCAB, n_embd=32, n_layer=1, n_head=2, n_positions=LENGTH
    )
    assert config.tie_word_embeddings
    transformers.GPT2LMHeadModel(config).save_pretrained(folder)
    return folder


def test_hugging_face_models_have_so_many_learned_positions(data, gpt2, llama, capsys):
    flags = ["--tokens", data / "ids.npy", "--sequence-length"]
    told = refusal("--hf", gpt2, *flags, LENGTH + 1)
    assert told == (
        f"a sequence length of {LENGTH + 1}: the model in {gpt2} has {LENGTH} positions; "
        f"accepted: --sequence-length {LENGTH} or less"
    )
    run_tool("evaluate", "--hf", gpt2, *flags, LENGTH)
    run_tool("evaluate", "--hf", llama[0], *flags, 100)  # 64 in training; it rotates
    assert capsys.readouterr().out.count("nats per token") == 2


def test_hugging_face_folders_need_no_tied_or_dispensable_tensors(data, gpt2, tmp_path, capsys):
    shutil.copy(gpt2 / "config.json", tmp_path)
    tensors = load_file(gpt2 / "model.safetensors")
    assert "lm_head.weight" not in tensors
    tensors["transformer.h.0.attn.bias"] = torch.ones(1)  # older versions stored it
    save_file(tensors, tmp_path / "model.safetensors", metadata={"format": "pt"})
    run_tool("evaluate", "--hf", tmp_path, "--tokens", data / "rows.npy")
    assert "nats per token" in capsys.readouterr().out


def test_logits_that_do_not_fit_are_refused_before_the_model_computes(
    data, trained, llama, tmp_path, monkeypatch
):
    models.init_parallel()  # this process holds one set of groups, also for tests after this one
    usage = shutil.disk_usage(tmp_path)
    needed = ROWS * LENGTH * VOCAB * 4
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=needed - 1))
    out = tmp_path / "logits.npy"
    for flags in (
        ("--load", trained[0], "--text", data / "valid.txt"),
        ("--hf", llama[0], "--tokens", data / "rows.npy"),
    ):
        assert f"--logits-out {out}: {needed / 1e6:.1f} MB are needed" in refusal(
            *flags, "--logits-out", out
        )
    assert not list(tmp_path.iterdir())


def test_space_for_logits_is_taken_at_once(tmp_path):
    with logits_file(tmp_path / "logits.npy", (4, 1024, 256)):
        (part,) = tmp_path.rglob("logits.npy")
        assert part.stat().st_blocks * 512 >= part.stat().st_size > 4 * 4 * 1024 * 256


@pytest.mark.parametrize("kept", [[], ["--keep-padding"]], ids=["", "with padding"])
def test_exported_folder_has_the_loss_of_its_checkpoint(data, trained, alone, tmp_path, kept):
    words = ("--load", trained[0], "--output", tmp_path / "model", *kept)
    run_tool("convert", "megatron-to-hf", *words)
    out = tmp_path / "logits.npy"
    flags = ["--hf", tmp_path / "model", "--text", data / "valid.txt", "--sequence-length", LENGTH]
    lines = printed(*flags, "--trust-remote-code", "--logits-out", out)
    losses = [float(loss) for loss in re.findall(r"^loss (\S+)", lines, re.MULTILINE)]
    expected = [alone[0]["loss"], alone[0]["padded_loss"]]
    assert losses == pytest.approx(expected if kept else expected[:1], abs=1e-5)
    assert ("with the rows that pad the vocabulary in the softmax, as training logs" in lines) == (
        bool(kept)
    )
    assert f"({ROWS * LENGTH} tokens in {ROWS} sequences)" in lines
    np.testing.assert_allclose(np.load(out), alone[1], atol=1e-4)


def refusal(*flags) -> str:
    with pytest.raises(ScMoEError) as refused:
        run_tool("evaluate", *flags)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def test_refusals(data, trained, llama, tmp_path):
    load, text = ("--load", trained[0]), ("--text", data / "valid.txt")
    existing = data / "rows.npy"
    many = tmp_path / "many.npy"
    np.save(many, np.array([1, 2, VOCAB]))
    halves = tmp_path / "halves.npy"
    np.save(halves, np.array([0.5, 1.5]))
    archive = tmp_path / "archive.npz"
    np.savez(archive, ids=np.array([1, 2]))
    for flags, told in (
        ((*load, "--tokens", archive), "it is an archive of arrays; accepted is a .npy file"),
        ((*load, "--text", "absent.txt"), "--text absent.txt: there is no such file"),
        (("--load", tmp_path, *text), f"--load {tmp_path}: there is no checkpoint"),
        ((*load, "--ckpt-step", 3, *text), "accepted: --ckpt-step 4, the nearest"),
        (
            (*load, *text, "--logits-out", existing),
            f"--logits-out: {existing} exists; give another --logits-out or --force",
        ),
        ((*load, "--tokens", many), f"it has the id {VOCAB}; accepted: ids from 0 to {VOCAB - 1}"),
        ((*load, "--tokens", halves), "it is float64 with 1 dimensions; accepted"),
        ((*load, "--tokens", data / "valid.txt"), "no .npy file of ids (its bytes are damaged, or"),
        ((*load, *text, "--micro-batch", 0), "--micro-batch 0: accepted is 1 or more"),
        ((*load, *text, "--trust-remote-code"), "--trust-remote-code: it goes with --hf only"),
        ((*load, *text, "--tokenizer-model", "no.model"), "--tokenizer-model no.model"),
        ((*load, "--tokens", existing, "--sequence-length", 5), "--sequence-length 5: the rows of"),
        (("--hf", tmp_path, *text), f"--hf {tmp_path}: transformers cannot load it"),
        (("--hf", llama[0], "--tokens", many), f"it has the id {VOCAB}"),
        (("--hf", llama[0], *text, "--ckpt-step", 0), "--ckpt-step: it goes with --load only"),
    ):
        assert told in refusal(*flags)


def test_fewer_rows_of_the_vocabulary_than_the_arguments_say(data, trained, tmp_path):
    checkpoint, name = read_megatron(trained[0]), "embedding.word_embeddings.weight"
    fewer = checkpoint.tensors[name].narrow(0, 0, 256)
    write_megatron(tmp_path, checkpoint.args, {**checkpoint.tensors, name: fewer})
    flags = ["--load", str(tmp_path), "--tokens", str(data / "rows.npy")]
    (told,) = run_distributed(refusal, 1, *flags)
    assert f"{name} in {tmp_path}" in told
    assert "has the shape (256, 32), and (384, 32) by the checkpoint's arguments" in told


class Touch:
    def __init__(self, file):
        self.file = file

    def __reduce__(self):
        return os.system, (f"touch {self.file}",)


@pytest.mark.parametrize(
    ("make", "told"),
    [
        (lambda file: b"\xc7" * 99, "(its bytes are damaged, or of another format)"),
        (lambda file: saved(Touch(file)), f"(it asks for {os.system.__module__}.system)"),
    ],
    ids=["damaged", "foreign pickle"],
)
def test_tensor_that_cannot_be_read(data, trained, tmp_path, make, told):
    folder = tmp_path / "copy"
    shutil.copytree(trained[0], folder)
    (path,) = folder.glob("iter_*")
    places = read_metadata(path).storage_data.items()
    place = next(info for key, info in places if key.fqn == "decoder.final_layernorm.weight")
    content = make(tmp_path / "executed")
    assert len(content) <= place.length
    with open(path / place.relative_path, "r+b") as stream:
        stream.seek(place.offset)
        stream.write(content.ljust(place.length, b"\0"))
    flags = ["--load", str(folder), "--tokens", str(data / "rows.npy")]
    (message,) = run_distributed(refusal, 1, *flags)  # in a process of its own: it makes groups
    assert message.startswith(f"--load {folder}: a tensor in {path} cannot be read {told}")
    assert not (tmp_path / "executed").exists()


def saved(value) -> bytes:
    """What the older of torch.save's formats makes of it, which may be followed by anything."""
    stream = io.BytesIO()
    torch.save(value, stream, _use_new_zipfile_serialization=False)
    return stream.getvalue()


@pytest.mark.parametrize("kind", ["tensor", "pipeline", "expert"])
def test_hugging_face_models_have_no_layout(data, llama, kind):
    flag = f"--{kind}-model-parallel-size"
    told = refusal("--hf", llama[0], "--text", data / "valid.txt", flag, 2)
    assert told == f"{flag}: it goes with --load only"


def test_layout_that_does_not_fit_is_one_line_and_status_2(data, trained):
    run = command(
        *("--load", trained[0], "--text", data / "valid.txt", "--expert-model-parallel-size", 3)
    )
    assert run.returncode == 2
    assert "--expert-model-parallel-size 3: the model has 4 experts" in run.stderr
    assert "Traceback" not in run.stderr
