"""tools/convert.py: what each command takes, and one line for whatever it is pointed at."""

import shutil
from pathlib import Path

import pytest
import torch
import transformers

from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor
from megatron_scmoe.checkpoints.torch_dist import read_megatron
from megatron_scmoe.checkpoints.torch_dist_writer import write_megatron
from megatron_scmoe.errors import ScMoEError
from tests import checkpoints, models
from tests.tools import tool

pytestmark = pytest.mark.slow

VOCAB = 301
EXPERTS = ("--num-experts", 2, "--topk", 1)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    """A Llama in a folder with a space in its name, beside a checkpoint of Megatron's."""
    path = tmp_path_factory.mktemp("some") / "a llama"
    torch.manual_seed(1)
    config = transformers.LlamaConfig(
        vocab_size=VOCAB, hidden_size=32, intermediate_size=48, num_hidden_layers=2,
        num_attention_heads=4, max_position_embeddings=64,
    )  # fmt: skip
    transformers.LlamaForCausalLM(config).save_pretrained(path)
    models.init_parallel()
    checkpoints.save(checkpoints.arguments("pos2"), path.parent / "checkpoint")
    return path


def convert(*words) -> None:
    tool("convert").main([str(word) for word in words])


def refusal(*words) -> str:
    with pytest.raises(ScMoEError) as refused:
        convert(*words)
    assert "\n" not in str(refused.value)
    return str(refused.value)


def nothing(path: Path) -> None:
    pass


def empty(path: Path) -> None:
    path.mkdir()


def one_file(path: Path) -> None:
    path.write_bytes(b"x")


def link_to_nothing(path: Path) -> None:
    path.symlink_to(path.parent / "gone")


def files(*names: str, **contents: str):
    """Makes a folder with these files."""

    def make(path: Path) -> None:
        for name in names:
            (path / name).parent.mkdir(parents=True, exist_ok=True)
            (path / name).write_text(contents.get(Path(name).stem, "x"))

    return make


TRACKER = "latest_checkpointed_iteration.txt"
FORMATS = {
    "nothing": (nothing, "no such file or folder"),
    "an empty folder": (empty, "an empty folder"),
    "a file": (one_file, "a file"),
    "a broken link": (link_to_nothing, "a link to nothing"),
    "torch": (
        files(
            TRACKER,
            "iter_0000005/mp_rank_00/model_optim_rng.pt",
            latest_checkpointed_iteration="5",
        ),
        "a checkpoint of Megatron's --ckpt-format torch",
    ),
    "zarr": (
        files("metadata.json", "w/.zarray", metadata='{"sharded_backend": "zarr"}'),
        "a distributed checkpoint of the backend zarr",
    ),
    "torch_dcp": (files(".metadata", "__0_0.distcp"), "a checkpoint of --ckpt-format torch_dcp"),
    "pickles": (files("pytorch_model.bin"), "pickled weights, which are never loaded"),
    "an adapter": (files("adapter_config.json", "adapter_model.safetensors"), "an adapter without"),
    "GGUF": (files("model.gguf"), "tensors in GGUF"),
    "safetensors": (files("model.safetensors"), "safetensors files without config.json"),
    "an optimizer": (
        files("optimizer.pt", "scheduler.pt"),
        "an optimizer's or a scheduler's state",
    ),
    "a tokenizer": (files("tokenizer.json"), "tokenizer without a model"),
    "iterations": (files("iter_0000005/common.pt"), f"checkpoints without {TRACKER}"),
    "text": (files("notes.txt"), "another folder"),
}


@pytest.mark.parametrize("name", FORMATS)
def test_inspect_says_what_another_format_is(tmp_path, name):
    make, told = FORMATS[name]
    make(tmp_path / "given")
    said = refusal("inspect", tmp_path / "given")
    assert said.startswith(str(tmp_path / "given")) and told in said
    assert "accepted: a" in said
    for words in (
        ("megatron-to-hf", "--load", tmp_path / "given", "--output", tmp_path / "out"),
        ("hf-to-megatron", "--input", tmp_path / "given", "--save", tmp_path / "out"),
        ("upcycle", "--input", tmp_path / "given", "--save", tmp_path / "out", *EXPERTS),
    ):
        said = refusal(*words)
        assert str(tmp_path / "given") in said and told in said
    assert not (tmp_path / "out").exists()


def test_each_direction_says_that_it_was_given_the_other_kind(folder, tmp_path):
    checkpoint = folder.parent / "checkpoint"
    (iteration,) = checkpoint.glob("iter_*")
    for given in (checkpoint, iteration):
        told = refusal("hf-to-megatron", "--input", given, "--save", tmp_path / "out")
        assert told == (
            f"--input {given}: a Megatron checkpoint; accepted: a Hugging Face folder with "
            "config.json and safetensors files"
        )
    told = refusal("megatron-to-hf", "--load", folder, "--output", tmp_path / "out")
    assert told.startswith(
        f"{folder}: no torch_dist checkpoint, but a Hugging Face folder; accepted"
    )


def test_evaluate_says_which_flag_a_folder_goes_with(folder):
    checkpoint = folder.parent / "checkpoint"
    for flag, given, kind, accepted in (
        ("--load", folder, "a Hugging Face folder", "--hf"),
        ("--hf", checkpoint, "a Megatron checkpoint", "--load"),
    ):
        with pytest.raises(ScMoEError) as refused:
            tool("evaluate").main([flag, str(given), "--text", __file__])
        assert str(refused.value) == f"{flag} {given}: it is {kind}; accepted: {accepted} {given}"


def test_inspect_says_that_weights_are_missing(folder, tmp_path):
    (tmp_path / "given").mkdir()
    args = read_megatron(folder.parent / "checkpoint").args
    state = {"optimizer.state.exp_avg.decoder.weight": LazyTensor.full((2, 2), 0.0, torch.float32)}
    write_megatron(tmp_path / "given", args, state)
    assert "no weights of a model, but an optimizer's" in refusal("inspect", tmp_path / "given")


def test_inspect_describes_what_an_older_megatron_saved(folder, tmp_path, capsys):
    """With fewer arguments than this one has."""
    checkpoint = read_megatron(folder.parent / "checkpoint")
    kept = {"num_layers", "hidden_size", "num_attention_heads", "ffn_hidden_size", "num_experts"}
    for name in vars(checkpoint.args).keys() - kept - {"moe_router_topk"}:
        delattr(checkpoint.args, name)
    (tmp_path / "old").mkdir()
    write_megatron(tmp_path / "old", checkpoint.args, checkpoint.tensors)
    convert("inspect", tmp_path / "old")
    assert "stock MoE GPT" in capsys.readouterr().out


def test_inspect_describes_links_and_names_with_spaces(folder, tmp_path, capsys):
    (tmp_path / "a link").symlink_to(folder)
    convert("inspect", tmp_path / "a link", "--keys")
    assert "model         Hugging Face folder" in capsys.readouterr().out
    (tmp_path / "checkpoint").symlink_to(folder.parent / "checkpoint")
    convert("inspect", tmp_path / "checkpoint")
    assert "tokens 64, embedding rows 96" in capsys.readouterr().out


def test_shards_may_be_links(folder, tmp_path):
    """As in the cache of Hugging Face's hub."""
    (tmp_path / "model").mkdir()
    for file in folder.iterdir():
        (tmp_path / "model" / file.name).symlink_to(file)
    convert("upcycle", "--input", tmp_path / "model", "--save", tmp_path / "a b", *EXPERTS)
    assert read_megatron(tmp_path / "a b").args.vocab_size == VOCAB


CONFIGS = {
    "truncated": (lambda text: text[: len(text) // 2], "config.json: not JSON"),
    "empty": (lambda text: "", "config.json: not JSON"),
    "a list": (lambda text: "[1]", "config.json: not a JSON object"),
    "no UTF-8": (lambda text: b"\xff\xfe" + text.encode(), "config.json: not JSON"),
    "deep": (lambda text: "[" * 100_000, "config.json: not JSON"),
    "another": (lambda text: '{"model_type": {"a": 1}}', "accepted: "),
    "no fields": (lambda text: '{"model_type": "llama"}', "by config.json"),
}


@pytest.mark.parametrize("name", CONFIGS)
def test_damaged_configurations(folder, tmp_path, name):
    damage, told = CONFIGS[name]
    shutil.copytree(folder, tmp_path / "model")
    file = tmp_path / "model" / "config.json"
    content = damage(file.read_text())
    file.write_bytes(content if isinstance(content, bytes) else content.encode())
    words = ("--input", tmp_path / "model", "--save", tmp_path / "out")
    assert told in refusal("upcycle", *words, *EXPERTS)
    assert str(tmp_path / "model") in refusal("hf-to-megatron", *words)


def as_folder(path: Path) -> None:
    path.unlink()
    path.mkdir()


def cut(path: Path) -> None:
    path.write_bytes(path.read_bytes()[:100])


WEIGHTS = {
    "a folder": (as_folder, "model.safetensors"),
    "cut": (cut, "truncated, or no safetensors file"),
    "empty": (lambda path: path.write_bytes(b""), "truncated, or no safetensors file"),
    "a link to nothing": (
        lambda path: (path.unlink(), path.symlink_to("gone")),
        "neither model.safetensors.index.json nor model.safetensors",
    ),
}


@pytest.mark.parametrize("name", WEIGHTS)
def test_damaged_weights(folder, tmp_path, name):
    damage, told = WEIGHTS[name]
    shutil.copytree(folder, tmp_path / "model")
    damage(tmp_path / "model" / "model.safetensors")
    words = ("--input", tmp_path / "model", "--save", tmp_path / "out")
    assert told in refusal("upcycle", *words, *EXPERTS)
    assert told in refusal("inspect", tmp_path / "model")


TRACKERS = {
    "empty": (lambda file: file.write_text(""), "'' is neither an iteration nor 'release'"),
    "words": (lambda file: file.write_text("seven"), "'seven' is neither an iteration"),
    "another": (lambda file: file.write_text("9"), "iter_0000009 is missing, which"),
    "long": (lambda file: file.write_text("9" * 5000), "is neither an iteration nor 'release'"),
    "a folder": (as_folder, "a folder of checkpoints without"),
    "metadata": (
        lambda file: (file.parent / "iter_0000007" / "metadata.json").write_text("[1]"),
        "its metadata.json is damaged",
    ),
}


@pytest.mark.parametrize("name", TRACKERS)
def test_damaged_folders_of_checkpoints(folder, tmp_path, name):
    damage, told = TRACKERS[name]
    shutil.copytree(folder.parent / "checkpoint", tmp_path / "copy")
    damage(tmp_path / "copy" / TRACKER)
    assert told in refusal("inspect", tmp_path / "copy")
    words = ("--load", tmp_path / "copy", "--output", tmp_path / "out")
    assert told in refusal("megatron-to-hf", *words)


TARGETS = {
    "/proc/save": "/proc/save: ",
    "gone/save": "there is no folder",
    "file/save": "there is no folder",
    "file": "exists; --force replaces it",
}


@pytest.mark.parametrize("target", TARGETS)
def test_targets_that_cannot_be_written(folder, tmp_path, monkeypatch, target):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").touch()
    told = refusal("upcycle", "--input", folder, "--save", target, *EXPERTS)
    assert TARGETS[target] in told


WRITERS = {
    "megatron-to-hf": ("--load", "--output"),
    "hf-to-megatron": ("--input", "--save"),
    "upcycle": ("--input", "--save"),
}


def help_of(command: str, capsys) -> str:
    with pytest.raises(SystemExit) as ended:
        convert(command, "--help")
    assert ended.value.code == 0
    return capsys.readouterr().out


@pytest.mark.parametrize("command", WRITERS)
def test_all_that_write_take_the_same(command, capsys):
    said = help_of(command, capsys)
    for flag in ("--dtype {fp32,bf16,fp16}", "--tokenizer PATH", "--force"):
        assert flag in said
    to_megatron = "--save" in WRITERS[command]
    for flag in ("--make-vocab-size-divisible-by N", "--target-tensor-parallel N"):
        assert (flag in said) == to_megatron
    assert ("--keep-padding" in said) != to_megatron


SHARED = (
    *("--tokenizer", "none", "--dtype", "bf16"),
    *("--make-vocab-size-divisible-by", 16, "--target-tensor-parallel", 3),
)


def test_shared_flags_of_an_import(folder, tmp_path):
    checkpoint = folder.parent / "checkpoint"
    convert("megatron-to-hf", "--load", checkpoint, "--output", tmp_path / "hf")
    convert("hf-to-megatron", "--input", tmp_path / "hf", "--save", tmp_path / "out", *SHARED)
    check_shared(tmp_path / "out", tokens=models.VOCAB, rows=96)


def test_shared_flags_of_upcycling(folder, tmp_path):
    convert("upcycle", "--input", folder, "--save", tmp_path / "out", *SHARED, *EXPERTS)
    check_shared(tmp_path / "out", tokens=VOCAB, rows=336)


def check_shared(save: Path, tokens: int, rows: int) -> None:
    checkpoint = read_megatron(save)
    args = checkpoint.args
    assert (args.tokenizer_type, args.tokenizer_model) == ("NullTokenizer", None)
    assert (args.vocab_size, args.padded_vocab_size) == (tokens, rows)
    assert args.make_vocab_size_divisible_by == 16
    assert checkpoint.tensors["embedding.word_embeddings.weight"].shape[0] == rows
    assert args.bf16 and {t.dtype for t in checkpoint.tensors.values()} == {torch.bfloat16}


def test_a_tokenizer_that_is_not_there_is_refused(folder, tmp_path):
    words = ("--input", folder, "--save", tmp_path / "out", "--tokenizer", tmp_path / "gone")
    told = f"--tokenizer {tmp_path / 'gone'}: no tokenizer is there; accepted: PATH or none"
    assert told in refusal("upcycle", *words, *EXPERTS)
