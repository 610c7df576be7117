"""Rows that pad Megatron's vocabulary: left out on the way to transformers, added on the way back."""

import json
import shutil
from argparse import Namespace
from pathlib import Path

import pytest
import sentencepiece
import torch
from megatron.core.tokenizers.utils.build_tokenizer import vocab_size_with_padding
from tokenizers import Tokenizer
from tokenizers.models import WordLevel
from tokenizers.pre_tokenizers import Whitespace
from transformers import AutoModelForCausalLM, PreTrainedTokenizerFast

from megatron_scmoe.checkpoints.convert import hf_to_megatron, megatron_to_hf
from megatron_scmoe.checkpoints.lazy_tensor import LazyTensor
from megatron_scmoe.checkpoints.tokenizers import find_tokenizer
from megatron_scmoe.checkpoints.torch_dist import read_megatron
from megatron_scmoe.checkpoints.torch_dist_writer import write_megatron
from megatron_scmoe.checkpoints.vocabulary import (
    EMBEDDING,
    OUTPUT_LAYER,
    Padding,
    check_tokenizer,
    count_tokens,
    set_rows,
)
from megatron_scmoe.errors import ConversionError, InputError
from megatron_scmoe.evaluation.hugging_face import HuggingFaceModel
from megatron_scmoe.evaluation.sequences import Sequences
from tests import checkpoints, models

pytestmark = pytest.mark.slow

TOKENS, ROWS = 61, checkpoints.ROWS


@pytest.fixture(scope="module")
def source(tmp_path_factory):
    """A checkpoint of 96 rows with a tokenizer of 61 entries, of the second kind untied."""
    folder = tmp_path_factory.mktemp("source")
    words = {f"w{i}": i for i in range(TOKENS - 1)} | {"<end>": TOKENS - 1}
    backend = Tokenizer(WordLevel(words, unk_token="w0"))
    backend.pre_tokenizer = Whitespace()
    PreTrainedTokenizerFast(tokenizer_object=backend, eos_token="<end>").save_pretrained(
        folder / "tokenizer"
    )
    models.init_parallel()
    for name, variant in (("untied", "pos2"), ("tied", "GPT-2")):
        args = checkpoints.arguments(variant)
        args.tokenizer_type = "HuggingFaceTokenizer"
        args.tokenizer_model, args.vocab_size = str(folder / "tokenizer"), None
        checkpoints.save(args, folder / name)
    return folder


@pytest.fixture(scope="module")
def pieces(tmp_path_factory):
    """A SentencePiece model of at most :data:`TOKENS` pieces."""
    prefix = tmp_path_factory.mktemp("sentencepiece") / "sp"
    sentencepiece.SentencePieceTrainer.train(
        sentence_iterator=iter(["the cat sat on the mat and the dog ran", "a cat, a dog"] * 30),
        model_prefix=str(prefix),
        vocab_size=TOKENS,
        hard_vocab_limit=False,
        minloglevel=2,
    )
    return prefix.with_suffix(".model")


def resize(model, tokenizer) -> None:
    model.resize_token_embeddings(len(tokenizer))


@pytest.mark.parametrize("kind", ["untied", "tied"])
@pytest.mark.parametrize(
    "keep_padding, change",
    [(False, resize), (True, resize), (True, lambda model, tokenizer: None)],
    ids=["without padding", "with padding, resized", "with padding"],
)
def test_tokens_added_after_the_export_are_generated(source, tmp_path, kind, keep_padding, change):
    megatron_to_hf(source / kind, tmp_path / "hf", keep_padding=keep_padding)
    tokenizer = PreTrainedTokenizerFast.from_pretrained(tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True).eval()
    tokenizer.add_tokens(["<new>", "<other>"])
    change(model, tokenizer)
    new = tokenizer.convert_tokens_to_ids("<new>")
    assert new == TOKENS
    prompt = tokenizer("w1 w2 w3", return_tensors="pt", return_token_type_ids=False)
    with torch.no_grad():  # as training would: the row points where the hidden state does
        hidden = model.model(**prompt).last_hidden_state[0, -1]
        model.lm_head.weight[new] = 100 * hidden / hidden.norm()
    generated = model.generate(**prompt, max_new_tokens=1, do_sample=False, pad_token_id=0)
    assert tokenizer.decode(generated[0, -1]) == "<new>"

    model.save_pretrained(tmp_path / "saved")
    tokenizer.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        expected = model(**prompt).logits[..., : TOKENS + 2]
    check_evaluation(tmp_path / "saved", prompt["input_ids"], expected)
    hf_to_megatron(tmp_path / "saved", tmp_path / "back")
    back = read_megatron(tmp_path / "back")
    assert back.args.vocab_size == TOKENS + 2 and back.args.padded_vocab_size == 128
    output = back.tensors[OUTPUT_LAYER if kind == "untied" else EMBEDDING].load()
    assert output.shape == (128, 32)
    assert torch.equal(output[new], model.lm_head.weight[new])


def test_tokens_added_in_the_folder_of_an_export_count(pieces, tmp_path):
    """SentencePiece's file lies there too, and knows nothing of them."""
    models.init_parallel()
    args = checkpoints.arguments("pos2")
    args.tokenizer_type, args.vocab_size = "SentencePieceTokenizer", None
    args.tokenizer_model = str(pieces)
    checkpoints.save(args, tmp_path / "source")
    folder = tmp_path / "hf"
    megatron_to_hf(tmp_path / "source", folder)
    hf_to_megatron(folder, tmp_path / "same")
    assert read_megatron(tmp_path / "same").args.tokenizer_type == "SentencePieceTokenizer"
    tokenizer = PreTrainedTokenizerFast.from_pretrained(folder)
    model = AutoModelForCausalLM.from_pretrained(folder, trust_remote_code=True)
    tokens = tokenizer.vocab_size + tokenizer.add_tokens(["<new>", "<other>"])
    resize(model, tokenizer)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    assert (folder / "tokenizer.model").is_file()
    hf_to_megatron(folder, tmp_path / "back")
    (tmp_path / "slow").mkdir()  # as transformers 4 saves a tokenizer of Python
    shutil.copy(folder / "tokenizer.model", tmp_path / "slow")
    for name, content in (
        ("added_tokens.json", {"<new>": tokens - 2, "<other>": tokens - 1}),
        ("tokenizer_config.json", {"tokenizer_class": "LlamaTokenizer"}),
    ):
        (tmp_path / "slow" / name).write_text(json.dumps(content))
    hf_to_megatron(folder, tmp_path / "from slow", tokenizer=str(tmp_path / "slow"))
    for back in ("back", "from slow"):
        args = read_megatron(tmp_path / back).args
        assert (args.vocab_size, args.tokenizer_type) == (tokens, "HuggingFaceTokenizer")
    megatron_to_hf(tmp_path / "back", tmp_path / "again")
    again = PreTrainedTokenizerFast.from_pretrained(tmp_path / "again")
    ids = again("<other> <new>", add_special_tokens=False)["input_ids"]
    assert tokens - 1 in ids and tokens - 2 in ids
    assert json.loads((tmp_path / "again" / "config.json").read_text())["vocab_size"] == tokens


def test_tokens_behind_a_gap_of_the_tokenizer_count(source, tmp_path):
    """An id that is no token is a row all the same."""
    args = read_megatron(source / "untied").args
    tokenizer = json.loads((source / "tokenizer" / "tokenizer.json").read_text())
    vocabulary = tokenizer["model"]["vocab"]
    vocabulary["far"] = ROWS - 2
    shutil.copytree(source / "tokenizer", tmp_path / "tokenizer")
    (tmp_path / "tokenizer" / "tokenizer.json").write_text(json.dumps(tokenizer))
    given = str(tmp_path / "tokenizer")
    assert find_tokenizer(args, given).tokens == ROWS - 1
    megatron_to_hf(source / "untied", tmp_path / "hf", tokenizer=given)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == ROWS - 1
    hf_to_megatron(tmp_path / "hf", tmp_path / "back")
    assert read_megatron(tmp_path / "back").args.vocab_size == ROWS - 1


def check_evaluation(folder: Path, ids: torch.Tensor, expected: torch.Tensor) -> None:
    """The loss is over tokens, those that were added too, and over no padding."""
    model = HuggingFaceModel(str(folder), trust_remote_code=True)
    assert model.vocab_size == TOKENS + 2
    report = model.evaluate(Sequences.from_rows(ids.numpy()))
    labels = torch.nn.functional.cross_entropy(expected[0, :-1], ids[0, 1:])
    assert report.loss == pytest.approx(labels.item(), rel=1e-5)


@pytest.mark.parametrize("keep_padding", [False, True])
def test_what_an_export_says_of_its_rows(source, tmp_path, keep_padding):
    lines = megatron_to_hf(source / "untied", tmp_path / "hf", keep_padding=keep_padding)
    config = json.loads((tmp_path / "hf" / "config.json").read_text())
    card = (tmp_path / "hf" / "README.md").read_text()
    assert "suppress_tokens" not in (tmp_path / "hf" / "generation_config.json").read_text()
    if keep_padding:
        assert (config["vocab_size"], config["unpadded_vocab_size"]) == (ROWS, TOKENS)
        assert lines[-1] == f"vocabulary: {TOKENS} tokens; ids from {TOKENS} to {ROWS - 1} pad it"
        assert f"| vocabulary | {TOKENS} tokens; ids from {TOKENS} to {ROWS - 1} pad it" in card
    else:
        assert (config["vocab_size"], config["unpadded_vocab_size"]) == (TOKENS, None)
        assert f"{TOKENS} tokens; {ROWS - TOKENS} rows that padded it are left out" in lines[-1]
        assert f"| vocabulary | {TOKENS} tokens |" in card


@pytest.mark.parametrize("tokenizer", [None, "none"])
def test_tokens_are_counted_by_the_tokenizer_even_if_it_is_left_out(source, tmp_path, tokenizer):
    megatron_to_hf(source / "untied", tmp_path / "hf", tokenizer=tokenizer)
    assert json.loads((tmp_path / "hf" / "config.json").read_text())["vocab_size"] == TOKENS


@pytest.mark.parametrize("model", ["gone", None])
def test_an_export_says_that_nobody_counts_tokens(source, tmp_path, model):
    checkpoint = read_megatron(source / "untied")
    checkpoint.args.tokenizer_model = model
    (tmp_path / "moved").mkdir()
    write_megatron(tmp_path / "moved", checkpoint.args, checkpoint.tensors)
    with pytest.raises(ConversionError, match="--tokenizer PATH or none"):
        megatron_to_hf(tmp_path / "moved", tmp_path / "hf")
    lines = megatron_to_hf(tmp_path / "moved", tmp_path / "hf", tokenizer="none")
    assert lines[-1].startswith(f"vocabulary: {ROWS} rows, with Megatron's padding if there is any")


def test_the_way_back_pads_for_any_layout(source, tmp_path):
    megatron_to_hf(source / "untied", tmp_path / "hf")
    for padding in (None, Padding(), Padding(128, 8), Padding(50, 3), Padding(1, 2)):
        hf_to_megatron(tmp_path / "hf", tmp_path / "back", padding=padding, force=True)
        args = read_megatron(tmp_path / "back").args
        padding = padding or Padding()
        args.tensor_model_parallel_size, args.rank = padding.tensor_parallel, 1
        assert args.padded_vocab_size == vocab_size_with_padding(TOKENS, args)
        tensors = read_megatron(tmp_path / "back").tensors
        for name in (EMBEDDING, OUTPUT_LAYER):
            rows = tensors[name].load()
            assert rows.shape == (args.padded_vocab_size, 32)
            assert not rows[TOKENS:].any() and rows[:TOKENS].any(1).all()


def test_rows_without_an_entry_of_the_tokenizer_are_told_of(source, tmp_path):
    megatron_to_hf(source / "untied", tmp_path / "hf")
    model = AutoModelForCausalLM.from_pretrained(tmp_path / "hf", trust_remote_code=True)
    model.resize_token_embeddings(TOKENS + 4)
    model.save_pretrained(tmp_path / "hf")
    line = f"the tokenizer has no entry for the last 4 of {TOKENS + 4} rows: they count as padding"
    assert line in hf_to_megatron(tmp_path / "hf", tmp_path / "back")
    assert "no entry" not in " ".join(
        hf_to_megatron(source_of_all(source, tmp_path), tmp_path / "b")
    )


def source_of_all(source: Path, folder: Path) -> Path:
    """A model whose rows are all tokens."""
    megatron_to_hf(source / "untied", folder / "all")
    return folder / "all"


@pytest.mark.parametrize(
    "padding, told",
    [
        (Padding(0), "--make-vocab-size-divisible-by 0: accepted: 1 or more"),
        (Padding(128, -1), "--target-tensor-parallel -1: accepted: 1 or more"),
    ],
)
def test_padding_that_cannot_be_is_refused(padding, told):
    with pytest.raises(ConversionError, match=told):
        padding.rows(10)


def test_a_tokenizer_much_smaller_than_the_model_is_another_ones():
    args = Namespace(
        padded_vocab_size=2048, make_vocab_size_divisible_by=128, tensor_model_parallel_size=1
    )
    check_tokenizer("--tokenizer-model a", 2048 - 1023, args)
    with pytest.raises(
        InputError, match="--tokenizer-model a: it has 266 entries, and the model 20"
    ):
        check_tokenizer("--tokenizer-model a", 266, args)


def test_a_tokenizer_larger_than_the_model_is_another_ones():
    args = Namespace(
        padded_vocab_size=2048, make_vocab_size_divisible_by=128, tensor_model_parallel_size=1
    )
    check_tokenizer("--tokenizer-model a", 2048, args)
    with pytest.raises(InputError, match="it has 2049 entries, and the model 2048 rows;"):
        check_tokenizer("--tokenizer-model a", 2049, args)


@pytest.mark.parametrize(
    "rows, declared, entries, tokens",
    [
        (96, None, None, 96),
        (96, 64, None, 64),
        (96, None, 61, 61),
        (96, 64, 61, 64),  # rows that the tokenizer does not use were in the model's vocabulary
        (96, 64, 70, 70),  # tokens added since
        (96, 1000, 61, 61),
        (96, 1000, None, 96),
    ],
)
def test_who_counts_tokens(rows, declared, entries, tokens):
    assert count_tokens(rows, declared, entries) == tokens


def test_rows_are_set_in_both_tensors_alone():
    whole = torch.arange(12.0).reshape(4, 3)
    names = (EMBEDDING, OUTPUT_LAYER, "decoder.final_layernorm.weight")
    tensors = {name: LazyTensor.from_tensor(whole) for name in names}
    for rows in (2, 4, 7):
        for name, tensor in set_rows(tensors, rows).items():
            changed = torch.nn.functional.pad(whole, (0, 0, 0, rows - 4))
            assert torch.equal(tensor.load(), whole if "norm" in name else changed)
