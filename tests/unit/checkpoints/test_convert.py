"""Conversions of whole folders: what is refused, tokenizers, memory, the command line."""

import io
import json
import os
import shutil
import subprocess
import sys
import weakref
from pathlib import Path

import pytest
import sentencepiece
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoTokenizer, GenerationConfig

from megatron_scmoe.checkpoints import tokenizers
from megatron_scmoe.checkpoints.convert import hf_to_megatron, megatron_to_hf, read_config
from megatron_scmoe.checkpoints.formats.registry import find_format
from megatron_scmoe.checkpoints.formats.scmoe import flags_from_config, to_hf, to_megatron
from megatron_scmoe.checkpoints.hf.configuration_scmoe import ScMoEConfig
from megatron_scmoe.checkpoints.hf.modeling_scmoe import ScMoEForCausalLM
from megatron_scmoe.checkpoints.inspect import count_parameters, describe
from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor, total_bytes
from megatron_scmoe.checkpoints.model_arguments import arguments_from_flags
from megatron_scmoe.checkpoints.safetensors_folder import write_safetensors
from megatron_scmoe.checkpoints.torch_dist import read_megatron
from megatron_scmoe.checkpoints.torch_dist_writer import _Writer, write_megatron
from megatron_scmoe.errors import ConversionError
from tests import checkpoints, models
from tests.tools import TOOLS, tool

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint saved by Megatron."""
    folder = tmp_path_factory.mktemp("source")
    models.init_parallel()
    checkpoints.save(checkpoints.arguments("pos2"), folder)
    return folder


@pytest.fixture(scope="module")
def exported(source, tmp_path_factory):
    """The same for transformers."""
    folder = tmp_path_factory.mktemp("exported") / "hf"
    megatron_to_hf(source, folder)
    return folder


@pytest.fixture
def copy(exported, tmp_path):
    """A copy of it that a test may damage."""
    shutil.copytree(exported, tmp_path / "copy")
    return tmp_path / "copy"


def change_config(folder: Path, **changes) -> None:
    config = read_config(folder)
    (folder / "config.json").write_text(json.dumps(config | changes))


def change_tensors(folder: Path, change) -> None:
    tensors = load_file(folder / "model.safetensors")
    change(tensors)
    save_file(tensors, folder / "model.safetensors", metadata={"format": "pt"})


def missing(folder):
    change_tensors(folder, lambda t: t.pop("model.layers.3.mlp.experts.2.up_proj.weight"))
    return r"tensor model\.layers\.3\.mlp\.experts\.2\.up_proj\.weight is missing"


def left_over(folder):
    change_tensors(folder, lambda t: t.update(extra=torch.ones(2)))
    return "tensor extra is left over"


def wrong_shape(folder):
    change_tensors(folder, lambda t: t.update({"model.norm.weight": torch.ones(31)}))
    return r"tensor model\.norm\.weight has the shape \[31\] instead of \[32\]"


def wrong_vocabulary(folder):
    change_config(folder, vocab_size=128)
    return r"tensor model\.embed_tokens\.weight has the shape \[64, 32\] instead of \[128, 32\]"


def unknown_architecture(folder):
    change_config(folder, model_type="resnet")
    return "model_type resnet; accepted: scmoe, longcat_flash"


def no_architecture(folder):
    change_config(folder, model_type=None)
    return "model_type None; accepted: scmoe, longcat_flash"


def text_for_a_number(folder):
    change_config(folder, hidden_size="big")
    return r"config\.json: hidden_size is 'big'; accepted: int"


def null_for_a_size(folder):
    change_config(folder, moe_intermediate_size=None)
    return r"config\.json: moe_intermediate_size is null; accepted: 1 or more"


def quantised(folder):
    name = "model.layers.0.mlp.down_proj.weight"
    change_tensors(folder, lambda t: t.update({name: t[name].to(torch.int8)}))
    return r"tensor model\.layers\.0\.mlp\.down_proj\.weight is int8; accepted: float32"


def number_for_a_file(folder):
    (folder / "model.safetensors").unlink()
    index = {"weight_map": {"model.norm.weight": 1}}
    (folder / "model.safetensors.index.json").write_text(json.dumps(index))
    return r"index\.json: 1 is not a file of this folder"


def no_config(folder):
    (folder / "config.json").unlink()
    return r"safetensors files without config\.json; accepted: a Hugging Face folder with"


def broken_config(folder):
    (folder / "config.json").write_text("{")
    return r"config\.json: not JSON"


def impossible_config(folder):
    change_config(folder, moe_layers=[1, 0, 1, 0])
    return r"config\.json: moe_layers=\[1, 0, 1, 0\]"


def unknown_activation(folder):
    change_config(folder, hidden_act="tanh")
    return "hidden_act tanh"


def unknown_rope(folder):
    change_config(folder, rope_parameters={"rope_type": "linear", "rope_theta": 1e4, "factor": 1.5})
    return "rope_parameters"


def truncated(folder):
    file = folder / "model.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    return r"model\.safetensors: truncated"


def remote_code(folder):
    """Code in a folder is never run."""
    (folder / "configuration_scmoe.py").write_text("raise SystemExit('executed')")
    (folder / "modeling_scmoe.py").write_text("raise SystemExit('executed')")
    change_config(folder, tap="pos9")
    return "tap='pos9'"


@pytest.mark.parametrize(
    "damage",
    [
        missing,
        left_over,
        wrong_shape,
        wrong_vocabulary,
        unknown_architecture,
        no_architecture,
        null_for_a_size,
        text_for_a_number,
        quantised,
        number_for_a_file,
        no_config,
        broken_config,
        impossible_config,
        unknown_activation,
        unknown_rope,
        truncated,
        remote_code,
    ],
)
def test_folders_that_cannot_be_converted_are_refused_in_one_line(copy, tmp_path, damage):
    expected = damage(copy)
    with pytest.raises(ConversionError, match=expected) as caught:
        hf_to_megatron(copy, tmp_path / "save")
    assert "\n" not in str(caught.value)
    assert str(copy) in str(caught.value)
    assert os.listdir(tmp_path) == ["copy"]


def rebuild(folder: Path, tmp_path: Path, change) -> None:
    """Write a checkpoint with changed tensors and arguments."""
    checkpoint = read_megatron(folder)
    change(checkpoint.tensors, checkpoint.args)
    (tmp_path / "changed").mkdir()
    write_megatron(tmp_path / "changed", checkpoint.args, checkpoint.tensors)


ROUTER = "decoder.layers.1.mlp.router.weight"
CHANGES = {
    f"tensor {ROUTER} is missing": lambda tensors, args: tensors.pop(ROUTER),
    "tensor decoder.extra.weight is left over": lambda tensors, args: tensors.update(
        {"decoder.extra.weight": LazyTensor.full((2,), 0.0, torch.float32)}
    ),
    f"tensor {ROUTER} has the shape [4, 32] instead of [6, 32]": lambda tensors, args: setattr(
        args, "num_experts", 6
    ),
    "tensor embedding.word_embeddings.weight is missing": lambda tensors, args: tensors.pop(
        "embedding.word_embeddings.weight"
    ),
    "it has 1000 tokens, the checkpoint's embedding 96 rows": lambda tensors, args: setattr(
        args, "vocab_size", 1000
    ),
    "no --scmoe-tap in the checkpoint's arguments": lambda tensors, args: delattr(
        args, "scmoe_tap"
    ),
    "the checkpoint's arguments have no moe_router_dtype": lambda tensors, args: delattr(
        args, "moe_router_dtype"
    ),
    "the checkpoint's arguments: moe_layers=[1, 0, 1, 0]": lambda tensors, args: setattr(
        args, "moe_layer_freq", 2
    ),
    "--tokenizer-type GPT2BPETokenizer: it cannot be converted": lambda tensors, args: setattr(
        args, "tokenizer_type", "GPT2BPETokenizer"
    ),
}


@pytest.mark.parametrize("expected", CHANGES)
def test_checkpoints_that_cannot_be_converted_are_refused(source, tmp_path, expected):
    rebuild(source, tmp_path, CHANGES[expected])
    with pytest.raises(ConversionError) as caught:
        megatron_to_hf(tmp_path / "changed", tmp_path / "hf")
    assert expected in str(caught.value)
    assert os.listdir(tmp_path) == ["changed"]


def test_a_damaged_tracker_or_metadata_is_refused_by_name(source, tmp_path):
    save = tmp_path / "save"
    shutil.copytree(source, save)
    (iteration,) = (folder for folder in save.iterdir() if folder.is_dir())
    (iteration / "metadata.json").write_text("{")
    with pytest.raises(ConversionError, match=r"metadata\.json is damaged"):
        read_megatron(save)
    (save / "latest_checkpointed_iteration.txt").write_bytes(b"\xff\xfe")
    with pytest.raises(ConversionError, match="is neither an iteration nor 'release'"):
        read_megatron(save)


def test_a_checkpoint_without_arguments_is_refused(source, tmp_path):
    rebuild(source, tmp_path, lambda tensors, args: None)
    checkpoint = read_megatron(source)
    (tmp_path / "bare").mkdir()
    write_megatron(tmp_path / "bare", None, checkpoint.tensors)
    with pytest.raises(ConversionError, match="no arguments were saved"):
        megatron_to_hf(tmp_path / "bare", tmp_path / "hf")


def test_full_disk_is_said_before_anything_is_written(source, exported, tmp_path, monkeypatch):
    usage = shutil.disk_usage(tmp_path)
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage._replace(free=1000))
    for convert in (
        lambda: megatron_to_hf(source, tmp_path / "out"),
        lambda: hf_to_megatron(exported, tmp_path / "out"),
    ):
        with pytest.raises(
            ConversionError,
            match=r"out: .* MB are needed, 0\.0 MB are free; accepted: a folder on another disk",
        ):
            convert()
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    "flags, expected",
    [
        (["--scmoe-tap", "pos9"], "argument --scmoe-tap: invalid choice"),
        (["--num-layers", "3"], "--num-layers 3"),
        (["--scmoe-expert-slot", "9"], "--scmoe-expert-slot 9"),
        (["--no-such-flag"], "unrecognized arguments: --no-such-flag"),
    ],
)
def test_arguments_that_make_no_model_are_refused(exported, flags, expected):
    model = flags_from_config(read_config(exported))
    with pytest.raises(ConversionError, match=expected):
        arguments_from_flags([*model, *flags], torch.float32, 96)
    with pytest.raises(ConversionError, match=r"weights of torch\.int8"):
        arguments_from_flags(model, torch.int8, 96)


class Live:
    """Sources that know how many of their bytes are in memory at once."""

    def __init__(self):
        self.now = self.peak = 0

    def tensor(self, shape) -> LazyTensor:
        def read(box):
            part = torch.zeros([s.stop - s.start for s in box])
            self._change(part.nbytes)
            weakref.finalize(part.untyped_storage(), self._change, -part.nbytes)
            return part

        return LazyTensor(shape, torch.float32, read)

    def _change(self, size: int) -> None:
        self.now += size
        self.peak = max(self.peak, self.now)


def test_memory_stays_near_the_largest_shard(exported, source, tmp_path, monkeypatch):
    config = read_config(exported) | {"vocab_size": 96}
    shapes = {name: tensor.shape for name, tensor in read_megatron(source).tensors.items()}
    live = Live()
    mapped = to_hf(config, {name: live.tensor(shape) for name, shape in shapes.items()})
    largest, shard = 96 * 32 * 4, 20_000
    assert total_bytes(mapped) > 10 * shard
    write_safetensors(tmp_path, mapped, shard)
    assert shard / 2 < live.peak <= shard + largest

    live = Live()
    mapped = to_megatron(config, {name: live.tensor(t.shape) for name, t in mapped.items()})
    monkeypatch.setattr(_Writer, "FILE_BYTES", shard)
    write_megatron(tmp_path, read_megatron(source).args, mapped)
    assert live.peak <= shard + 2 * largest  # joined, and the parts it is made of


def test_what_a_folder_holds(source, exported):
    names = {path.name for path in exported.iterdir()}
    assert names == {
        "README.md",
        "config.json",
        "configuration_scmoe.py",
        "generation_config.json",
        "model.safetensors",
        "modeling_scmoe.py",
    }
    umask = os.umask(0)
    os.umask(umask)
    modes = {path.stat().st_mode & 0o777 for path in exported.iterdir() if path.suffix != ".py"}
    assert modes == {0o666 & ~umask}
    config = read_config(exported)
    assert config["vocab_size"] == 64 and config["unpadded_vocab_size"] is None
    assert GenerationConfig.from_pretrained(exported).suppress_tokens is None
    card = (exported / "README.md").read_text()
    assert card.startswith("---\nlibrary_name: transformers\n")
    assert ("tokenizer = AutoTokenizer" in card) == tokenizers.has_tokenizer(exported)
    assert "| tap, combine | pos2, cg1 |" in card and "| experts | 4, 2 for a token |" in card


def test_the_modelling_code_needs_torch_and_transformers_alone(exported):
    for file in find_format("scmoe").code:
        copied = (exported / file.name).read_text()
        assert copied == file.read_text()
        imports = [line for line in copied.splitlines() if line.startswith(("import ", "from "))]
        roots = {line.split()[1].split(".")[0] for line in imports}
        assert roots <= {"torch", "transformers", ""}  # and each other


def test_zero_centred_norms_are_stored_minus_one(exported):
    config = ScMoEConfig.from_pretrained(exported)
    model = ScMoEForCausalLM.from_pretrained(exported).eval()
    config.norm_zero_centered = True
    centred = ScMoEForCausalLM(config).eval()
    state = model.state_dict()
    state = {key: value - 1 if "norm" in key else value for key, value in state.items()}
    centred.load_state_dict(state)
    tokens, _ = models.batch(0)
    with torch.no_grad():
        assert (centred(tokens).logits - model(tokens).logits).abs().max() < 1e-5
    assert "--apply-layernorm-1p" in flags_from_config(config.to_dict())
    with pytest.raises(ConversionError, match=r"attention_scale 0\.5: Megatron has no flag"):
        flags_from_config(config.to_dict() | {"attention_scale": 0.5})


def test_inspect_counts_what_the_model_has(source, exported):
    checkpoint = read_megatron(source)
    total, active = count_parameters(checkpoint.tensors, checkpoint.args)
    model = checkpoints.build(checkpoint.args)
    padding = 2 * (96 - 64) * 32  # rows of embedding and output layer, which are no tokens
    assert total == sum(p.numel() for p in model.parameters()) - padding
    experts = sum(p.numel() for n, p in model.named_parameters() if ".local_experts." in n)
    assert active == total - experts // 2  # two of four
    lines = describe(source, keys=True)
    assert any("ScMoE GPT: tap pos2, combine cg1" in line for line in lines)
    assert any("TP 1, PP 1, EP 1" in line for line in lines)
    assert any(line.startswith(ROUTER) and "[4, 32] float32" in line for line in lines)
    assert any(f"{total:,}" in line and f"{active:,}" in line for line in describe(exported))
    assert len(describe(exported)) < 10 < len(describe(exported, keys=True))


@pytest.mark.parametrize("path", ["nowhere", "."])
def test_inspect_refuses_what_is_neither(tmp_path, path):
    with pytest.raises(ConversionError):
        describe(tmp_path / path)


TEXT = [
    "def add(a, b):",
    "    return a + b  # the sum of both",
    "class Empty: pass",
    "naïve café, Größe, Ωmega, русский, 漢字",
    "numbers 0123456789 and 3.14",
] * 40

OURS = dict(
    byte_fallback=True,
    normalization_rule_name="identity",
    remove_extra_whitespaces=False,
    add_dummy_prefix=False,
    allow_whitespace_only_pieces=True,
    split_digits=True,
)
"""As tools/train_tokenizer.py sets it."""

SETTINGS = {
    "ours": OURS,
    "default": {},
    "Llama's": OURS | dict(add_dummy_prefix=True),
    "symbols": OURS | dict(user_defined_symbols=["<sep>", "==="], control_symbols=["<turn>"]),
}


def train_sentencepiece(file: Path, **settings) -> sentencepiece.SentencePieceProcessor:
    model = io.BytesIO()
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(TEXT),
        model_writer=model,
        minloglevel=2,
        num_threads=1,
        hard_vocab_limit=False,
        **{"vocab_size": 380} | settings,
    )
    file.write_bytes(model.getvalue())
    return sentencepiece.SentencePieceProcessor(model_file=str(file))


@pytest.mark.parametrize("kind", ["bpe", "unigram"])
@pytest.mark.parametrize("name", SETTINGS)
def test_fast_tokenizers_give_sentencepieces_ids(tmp_path, kind, name):
    settings = SETTINGS[name] | ({} if "byte_fallback" in SETTINGS[name] else {"vocab_size": 100})
    file = tmp_path / "t.model"
    processor = train_sentencepiece(file, model_type=kind, pad_id=3, **settings)
    fast = tokenizers.fast_tokenizer(file)
    assert len(fast) == processor.get_piece_size()
    for special in ("bos", "eos", "pad", "unk"):
        assert getattr(fast, f"{special}_token_id") == getattr(processor, f"{special}_id")()
    texts = [*TEXT[:5], "\n".join(TEXT[:5]), "a === b<sep>c  d===", *tokenizers.SAMPLES]
    for text in texts:
        ids = processor.encode(text)
        assert fast.encode(text, add_special_tokens=False) == ids, text
        if (
            name != "default"
        ):  # its normaliser loses characters, and each unknown one is decoded alone
            assert fast.decode(ids) == processor.decode(ids), text


def test_a_tokenizer_that_would_give_other_ids_is_refused(tmp_path):
    # SentencePiece never finds a symbol with a space in it; the fast tokenizer does.
    train_sentencepiece(
        tmp_path / "t.model", model_type="bpe", **OURS, user_defined_symbols=["def "]
    )
    with pytest.raises(ConversionError, match=r"gives other ids for .def f"):
        tokenizers.fast_tokenizer(tmp_path / "t.model")
    (tmp_path / "no.model").write_bytes(b"nothing")
    with pytest.raises(ConversionError, match="not a SentencePiece model"):
        tokenizers.fast_tokenizer(tmp_path / "no.model")


@pytest.fixture(scope="module")
def with_tokenizer(tmp_path_factory):
    """A checkpoint whose arguments name a SentencePiece model, and that model."""
    folder = tmp_path_factory.mktemp("tokenizer")
    processor = train_sentencepiece(folder / "small.model", model_type="bpe", pad_id=3, **OURS)
    args = checkpoints.arguments("pos2")
    args.tokenizer_type, args.tokenizer_model = (
        "SentencePieceTokenizer",
        str(folder / "small.model"),
    )
    args.padded_vocab_size = 512
    models.init_parallel()
    checkpoints.save(args, folder / "checkpoint")
    return folder / "checkpoint", folder / "small.model", processor


def test_the_checkpoints_tokenizer_goes_along_and_comes_back(with_tokenizer, tmp_path):
    checkpoint, _, processor = with_tokenizer
    megatron_to_hf(checkpoint, tmp_path / "hf")
    fast = AutoTokenizer.from_pretrained(tmp_path / "hf")
    assert fast.is_fast
    assert fast(TEXT[1])["input_ids"] == processor.encode(TEXT[1])
    config = read_config(tmp_path / "hf")
    assert config["eos_token_id"] == processor.eos_id() == fast.eos_token_id
    assert config["vocab_size"] == processor.get_piece_size() == len(fast)
    hf_to_megatron(tmp_path / "hf", tmp_path / "back")
    args = read_megatron(tmp_path / "back").args
    assert args.tokenizer_type == "SentencePieceTokenizer"
    assert Path(args.tokenizer_model) == tmp_path / "hf" / "tokenizer.model"
    (tmp_path / "hf" / "tokenizer.model").unlink()
    hf_to_megatron(tmp_path / "hf", tmp_path / "back", force=True)
    args = read_megatron(tmp_path / "back").args
    assert (args.tokenizer_type, args.tokenizer_model) == ("HuggingFaceTokenizer", f"{tmp_path}/hf")


def test_a_tokenizer_larger_than_the_embedding_is_refused(with_tokenizer, exported, tmp_path):
    """SentencePiece's file as well as the fast tokenizer; nothing is written."""
    _, file, processor = with_tokenizer
    shutil.copytree(exported, tmp_path / "copy")
    shutil.copy(file, tmp_path / "copy" / "tokenizer.model")
    told = f"its tokenizer has {processor.get_piece_size()} entries, the embedding {models.VOCAB}"
    with pytest.raises(ConversionError, match=told):
        hf_to_megatron(tmp_path / "copy", tmp_path / "save")
    (tmp_path / "copy" / "tokenizer.model").unlink()
    tokenizers.fast_tokenizer(file).save_pretrained(tmp_path / "copy")
    with pytest.raises(ConversionError, match=told):
        hf_to_megatron(tmp_path / "copy", tmp_path / "save")
    (tmp_path / "copy" / "tokenizer.json").write_text("{")
    with pytest.raises(ConversionError, match="cannot be loaded"):
        hf_to_megatron(tmp_path / "copy", tmp_path / "save")
    assert os.listdir(tmp_path) == ["copy"]


def test_another_tokenizer_or_none_can_be_given(with_tokenizer, tmp_path):
    checkpoint, _, processor = with_tokenizer
    megatron_to_hf(checkpoint, tmp_path / "one")
    megatron_to_hf(checkpoint, tmp_path / "two", tokenizer=str(tmp_path / "one"))
    megatron_to_hf(checkpoint, tmp_path / "one", force=True)  # what it wrote, it replaces
    fast = AutoTokenizer.from_pretrained(tmp_path / "two")
    assert fast(TEXT[3])["input_ids"] == processor.encode(TEXT[3])
    (said,) = (
        line
        for line in megatron_to_hf(checkpoint, tmp_path / "none", tokenizer="none")
        if "no tokenizer" in line
    )
    assert "--tokenizer none" in said
    assert not list((tmp_path / "none").glob("token*"))
    with pytest.raises(ConversionError, match=r"tokenizer .*gone: no such file"):
        megatron_to_hf(checkpoint, tmp_path / "out", tokenizer=str(tmp_path / "gone"))
    with pytest.raises(ConversionError, match="it cannot be loaded"):
        megatron_to_hf(checkpoint, tmp_path / "out", tokenizer=str(tmp_path / "none"))
    assert not (tmp_path / "out").exists()


def test_command_line_converts_and_inspects(source, tmp_path, capsys):
    convert = tool("convert")
    hf, back = str(tmp_path / "hf"), str(tmp_path / "back")
    convert.main(["megatron-to-hf", "--load", str(source), "--output", hf, "--dtype", "bf16"])
    convert.main(["hf-to-megatron", "--input", hf, "--save", back])
    convert.main(["inspect", back, "--keys"])
    printed = capsys.readouterr().out
    assert "no tokenizer (the checkpoint's is NullTokenizer)" in printed
    assert "bfloat16 (" in printed and ROUTER in printed
    with pytest.raises(ConversionError, match="exists; --force replaces it"):
        convert.main(["hf-to-megatron", "--input", hf, "--save", back])
    convert.main(["hf-to-megatron", "--input", hf, "--save", back, "--force"])
    with pytest.raises(ConversionError, match="holds what is read"):
        convert.main(["megatron-to-hf", "--load", back, "--output", back, "--force"])


def test_command_line_says_what_is_wrong_in_one_line(tmp_path):
    command = [sys.executable, TOOLS / "convert.py", "megatron-to-hf"]
    run = subprocess.run(
        [*command, "--load", tmp_path, "--output", tmp_path / "out"], capture_output=True, text=True
    )
    assert run.returncode == 2
    lines = [line for line in run.stderr.splitlines() if "CUDA" not in line]
    assert lines == [
        f"convert.py: error: {tmp_path}: no torch_dist checkpoint, but an empty folder; accepted: a "
        "folder with latest_checkpointed_iteration.txt, or an iter_ folder"
    ]
    assert os.listdir(tmp_path) == []
