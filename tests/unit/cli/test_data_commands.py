"""The data tools, on real text: what Megatron reads back is what was in the files."""

import argparse
import bz2
import gzip
import json
import lzma
import os
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_scmoe.platform.command_line import UsageError, file_prefix
from tests.tools import TOOLS, run_tool, tool

pytestmark = pytest.mark.slow

# Indentation, blank lines, CR LF, tabs, characters outside any small vocabulary, no final newline.
TEXTS = {
    "a.txt": "def add(a, b):\n    return a + b\n\n\nclass Empty:\n\tpass\n" * 40,
    "b.txt": "  leading and trailing white space  \r\n\r\nnumbers 0123456789 and 3.14\n" * 40,
    "sub/c.txt": "naïve café, Ωmega, 漢字, \U0001f600; control \x01 and </s> as text" * 40,
}
VOCAB_SIZE = 400


@pytest.fixture(scope="module")
def corpus(tmp_path_factory):
    folder = tmp_path_factory.mktemp("corpus")
    for name, text in TEXTS.items():
        (folder / name).parent.mkdir(exist_ok=True)
        (folder / name).write_bytes(text.encode())
    (folder / "picture.png").write_bytes(b"\x89PNG\xff\xfe")
    return folder


@pytest.fixture(scope="module")
def tokenizer_model(corpus, tmp_path_factory):
    prefix = tmp_path_factory.mktemp("tokenizer") / "small"
    run_tool(
        "train_tokenizer", "--input", corpus, "--vocab-size", VOCAB_SIZE, "--output-prefix", prefix
    )
    return Path(f"{prefix}.model")


@pytest.fixture
def tokenizer(tokenizer_model):
    return tool("preprocess_data").load_tokenizer(tokenizer_model)


@pytest.fixture
def preprocess(tokenizer_model, tmp_path):
    """Run the command line; return what Megatron's --data-path takes."""

    def run(*inputs, key="text", **flags):
        options = [word for name, value in flags.items() for word in (f"--{name}", *value)]
        run_tool(
            "preprocess_data", "--input", *inputs, "--tokenizer-model", tokenizer_model,
            "--output-prefix", tmp_path / "out" / "data", "--json-key", key, *options,
        )  # fmt: skip
        return tmp_path / "out" / f"data_{key}_document"

    return run


@pytest.fixture
def refused():
    """Run a tool's command line that must be refused; return its message, one line."""

    def run(name, *argv):
        with pytest.raises(UsageError) as caught:
            run_tool(name, *argv)
        message = str(caught.value)
        assert "\n" not in message
        return message

    return run


def decoded(dataset, tokenizer):
    """The text of each document, without the token at its end."""
    assert all(ids[-1] == tokenizer.eod for ids in dataset)
    return [tokenizer.detokenize(ids[:-1].tolist()) for ids in dataset]


class TestTokenizer:
    @pytest.mark.parametrize("name", TEXTS)
    def test_decodes_what_it_encoded(self, name, tokenizer):
        assert tokenizer.detokenize(tokenizer.tokenize(TEXTS[name])) == TEXTS[name]

    def test_has_the_special_tokens_megatron_asks_for(self, tokenizer):
        ids = {"unk": tokenizer.unk, "bos": tokenizer.bos, "eod": tokenizer.eod}
        assert {**ids, "pad": tokenizer.pad} == {"unk": 0, "bos": 1, "eod": 2, "pad": 3}
        assert tokenizer.vocab_size == VOCAB_SIZE

    def test_never_takes_text_for_a_special_token(self, tokenizer):
        assert tokenizer.eod not in tokenizer.tokenize("</s><pad><s><unk>")

    @pytest.mark.parametrize("model_type", ["bpe", "unigram"])
    def test_same_text_gives_same_bytes(self, model_type, tmp_path):
        models = []
        for attempt in ("first", "second"):
            prefix = tmp_path / attempt / "model"
            run_tool(
                "train_tokenizer", "--input", TOOLS, "--suffix", ".py", "--vocab-size", 600,
                "--model-type", model_type, "--output-prefix", prefix,
            )  # fmt: skip
            models.append(Path(f"{prefix}.model").read_bytes())
        assert models[0] == models[1]

    def test_usual_size_is_what_a_small_text_has(self, corpus, tmp_path, capsys):
        run_tool("train_tokenizer", "--input", corpus, "--output-prefix", tmp_path / "x")
        size = int(capsys.readouterr().out.split(": ")[1].split()[0])
        assert 300 < size < 4096
        assert len((tmp_path / "x.vocab").read_text().split("\n")) > size

    @pytest.mark.parametrize("text", ["a", "short", "    ", "a\n" * 10])
    def test_learns_from_the_smallest_text(self, text, tmp_path):
        (tmp_path / "a.txt").write_text(text)
        run_tool("train_tokenizer", "--input", tmp_path, "--output-prefix", tmp_path / "x")
        assert (tmp_path / "x.model").stat().st_size > 0

    def test_long_lines_are_learnt_from_in_parts(self):
        long = "x" * 200_000
        lines = tool("train_tokenizer").split_lines(
            [tool("documents").Document("", f"{long}\n\ny")]
        )
        assert list(map(len, lines)) == [65536, 65536, 65536, 3392, 1]

    def test_sample_is_even_and_within_its_size(self):
        lines = [f"{i:04d}" for i in range(100)]
        assert tool("train_tokenizer").sample_lines(lines, 100) == lines[::4]


class TestPreprocess:
    def test_megatron_reads_back_the_text(self, preprocess, corpus, tokenizer):
        dataset = IndexedDataset(str(preprocess(corpus)))
        assert decoded(dataset, tokenizer) == list(TEXTS.values())

    def test_each_document_ends_with_eod(self, preprocess, corpus, tokenizer):
        plain = [tokenizer.tokenize(text) for text in TEXTS.values()]
        dataset = IndexedDataset(str(preprocess(corpus)))
        assert [ids.tolist() for ids in dataset] == [[*ids, tokenizer.eod] for ids in plain]
        assert dataset.document_indices.tolist() == [0, 1, 2, 3]

    def test_documents_may_run_together(self, preprocess, corpus, tokenizer):
        dataset = IndexedDataset(str(preprocess(corpus, **{"no-append-eod": []})))
        assert [ids.tolist() for ids in dataset] == [tokenizer.tokenize(t) for t in TEXTS.values()]

    def test_json_lines_are_documents(self, preprocess, tmp_path, tokenizer):
        file = tmp_path / "lines.jsonl"
        lines = ['{"body": "first\\nline", "id": 1}', "", '{"body": "zw\u00f6lf"}', '{"body": ""}']
        file.write_text("\n".join(lines), encoding="utf-8")
        dataset = IndexedDataset(str(preprocess(file, key="body")))
        assert decoded(dataset, tokenizer) == ["first\nline", "zwölf"]

    def test_workers_do_not_change_a_byte(self, preprocess, tmp_path):
        file = tmp_path / "many.jsonl"
        file.write_text("".join(f'{{"text": "line {i} {"x" * (i % 7)}"}}\n' for i in range(300)))
        one = preprocess(file)
        first = [Path(f"{one}{suffix}").read_bytes() for suffix in (".bin", ".idx")]
        two = preprocess(file, workers=["2"], force=[])
        assert [Path(f"{two}{suffix}").read_bytes() for suffix in (".bin", ".idx")] == first

    def test_gpt_dataset_yields_the_text_shifted_by_one(
        self, preprocess, corpus, tokenizer, tmp_path
    ):
        prefix = str(preprocess(corpus))
        config = GPTDatasetConfig(
            random_seed=1, sequence_length=32, blend=([prefix], None), split="1,0,0",
            tokenizer=tokenizer, path_to_cache=str(tmp_path / "cache"),
            mid_level_dataset_surplus=0.005, reset_position_ids=False, reset_attention_mask=False,
            eod_mask_loss=False,
        )  # fmt: skip
        indexed = IndexedDataset(prefix)
        dataset = GPTDataset(indexed, prefix, np.arange(len(indexed)), None, Split.train, config)

        stream = np.concatenate([indexed[i] for i in dataset.document_index])
        order = np.argsort(dataset.shuffle_index)
        for place, index in enumerate(order[:5]):
            sample = dataset[int(index)]
            start = place * 32
            assert sample["tokens"].tolist() == stream[start : start + 32].tolist()
            assert sample["labels"].tolist() == stream[start + 1 : start + 33].tolist()


class TestErrors:
    def test_missing_input(self, refused, tokenizer_model, tmp_path):
        message = refused(
            "preprocess_data", "--input", tmp_path / "nowhere", "--tokenizer-model",
            tokenizer_model, "--output-prefix", tmp_path / "x",
        )  # fmt: skip
        assert message.startswith(f"--input {tmp_path / 'nowhere'}: no such file or folder")

    @pytest.mark.parametrize("name", ["b.txt.zst", "b.txt", "b.TXT", "pipe.txt"])
    def test_file_of_a_folder_that_cannot_be_read(self, name, refused, tmp_path):
        """What stands beside it is not all of the text."""
        folder = tmp_path / "folder"
        folder.mkdir()
        (folder / "a.txt").write_text("text")
        if name == "pipe.txt":
            os.mkfifo(folder / name)
        elif name == "b.txt.zst":
            (folder / name).touch()
        else:
            (folder / name).symlink_to("nowhere")
        message = refused("train_tokenizer", "--input", folder, "--output-prefix", tmp_path / "x")
        assert message.startswith(f"--input {folder / name}: ")

    def test_folders_behind_links_are_read_once(self, tmp_path):
        from megatron_scmoe.cli.documents import find_files

        for name in ("corpus/own", "elsewhere/deep"):
            (tmp_path / name).mkdir(parents=True)
            (tmp_path / name / "a.txt").write_text("text")
        corpus = tmp_path / "corpus"
        (corpus / "linked").symlink_to(tmp_path / "elsewhere")
        (corpus / "twice").symlink_to(corpus / "own")
        (tmp_path / "elsewhere" / "back").symlink_to(corpus)
        assert find_files([corpus]) == [corpus / "linked/deep/a.txt", corpus / "own/a.txt"]

    def test_folder_without_text(self, refused, tmp_path):
        (tmp_path / "code.py").write_text("pass\n")
        message = refused("train_tokenizer", "--input", tmp_path, "--output-prefix", tmp_path / "x")
        assert message.startswith(f"--input {tmp_path}: no file in this folder ends in .txt")

    @pytest.mark.parametrize("size", [10, 100_000])
    @pytest.mark.parametrize("model_type", ["bpe", "unigram"])
    def test_vocabulary_that_does_not_fit_the_text(
        self, size, model_type, refused, corpus, tmp_path
    ):
        message = refused(
            "train_tokenizer", "--input", corpus, "--output-prefix", tmp_path / "x",
            "--vocab-size", size, "--model-type", model_type,
        )  # fmt: skip
        assert message.startswith(f"--vocab-size {size}: too {'small' if size == 10 else 'large'}")
        assert "accepted is" in message
        assert list(tmp_path.iterdir()) == []

    def test_key_that_is_no_part_of_a_file_name(self, refused, corpus, tokenizer_model, tmp_path):
        told = refused(
            "preprocess_data", "--input", corpus, "--tokenizer-model", tokenizer_model,
            "--output-prefix", tmp_path / "out" / "data", "--json-key", "a/b",
        )  # fmt: skip
        assert told.startswith("--json-key a/b: ") and "accepted is a key without /" in told
        assert not (tmp_path / "out").exists()

    def test_existing_output_is_kept(self, refused, preprocess, corpus, tokenizer_model, tmp_path):
        prefix = preprocess(corpus)
        before = Path(f"{prefix}.bin").read_bytes()
        message = refused(
            "preprocess_data", "--input", corpus / "a.txt", "--tokenizer-model", tokenizer_model,
            "--output-prefix", tmp_path / "out" / "data",
        )  # fmt: skip
        assert message.endswith("give another --output-prefix or --force")
        assert Path(f"{prefix}.bin").read_bytes() == before

    def test_output_that_cannot_be_written(self, refused, corpus, tokenizer_model, tmp_path):
        (tmp_path / "file").write_text("not a folder")
        message = refused(
            "preprocess_data", "--input", corpus, "--tokenizer-model", tokenizer_model,
            "--output-prefix", tmp_path / "file" / "data",
        )  # fmt: skip
        assert message.startswith(f"--output-prefix: cannot write in {tmp_path / 'file'}")

    def test_more_workers_than_any_machine_has(self, refused, corpus, tokenizer_model, tmp_path):
        message = refused(
            "preprocess_data", "--input", corpus, "--tokenizer-model", tokenizer_model,
            "--output-prefix", tmp_path / "x", "--workers", 100_000,
        )  # fmt: skip
        assert message == "--workers 100000: accepted is 1 to 256"

    def test_a_folder_is_not_how_files_begin(self):
        with pytest.raises(argparse.ArgumentTypeError, match=r"out/: a folder; .*: out/NAME"):
            file_prefix("out/")
        assert file_prefix("out/x") == Path("out/x")

    @pytest.mark.parametrize("workers", [1, 2])
    def test_undecodable_text_leaves_nothing_behind(
        self, workers, refused, corpus, tokenizer_model, tmp_path
    ):
        bad = tmp_path / "latin1.txt"
        bad.write_bytes("caf\u00e9".encode("latin-1"))
        message = refused(
            "preprocess_data", "--input", corpus, bad, "--tokenizer-model", tokenizer_model,
            "--output-prefix", tmp_path / "out" / "x", "--workers", workers,
        )  # fmt: skip
        assert message == (
            f"--input {bad}:1: byte 3 is not UTF-8; accepted is UTF-8 text, or --skip-bad-lines to "
            "leave such lines out"
        )
        assert list((tmp_path / "out").iterdir()) == []

    def test_text_without_a_token(self, refused, tokenizer_model, tmp_path):
        (tmp_path / "empty.txt").touch()
        message = refused(
            "preprocess_data", "--input", tmp_path, "--tokenizer-model", tokenizer_model,
            "--output-prefix", tmp_path / "x",
        )  # fmt: skip
        assert message == "--input: there is no text in it"

    def test_token_that_does_not_fit_the_data_type(self, tmp_path):
        class Overflowing:
            vocab_size = 65_000  # stored as uint16

            def tokenize(self, text):
                return [1, 70_000]

        document = tool("documents").Document("big.txt", "text")
        with pytest.raises(UsageError, match=r"token id 70000 of big\.txt does not"):
            tool("preprocess_data").preprocess(
                [document], Overflowing(), tmp_path / "x", append_eod=False
            )
        assert list(tmp_path.iterdir()) == []

    def test_file_that_is_no_tokenizer(self, refused, corpus, tmp_path):
        message = refused(
            "preprocess_data", "--input", corpus, "--tokenizer-model", corpus / "a.txt",
            "--output-prefix", tmp_path / "x",
        )  # fmt: skip
        assert message.startswith(f"--tokenizer-model {corpus / 'a.txt'}: cannot be loaded")

    def test_command_line_says_it_in_one_line_with_a_status(self, tmp_path):
        command = [sys.executable, TOOLS / "train_tokenizer.py", "--input", tmp_path / "nowhere"]
        result = subprocess.run(
            [*command, "--output-prefix", tmp_path / "x"], capture_output=True, text=True
        )
        assert result.returncode == 2
        assert result.stdout == ""
        assert result.stderr.count("\n") == 1
        assert result.stderr.startswith("train_tokenizer.py: error: --input")


BAD_LINES = {
    b"caf\xe9": "--input {line}: byte 3 is not UTF-8",
    b'{"text": "\xed\xa0\x80"}': "--input {line}: byte 10 is not UTF-8",
    b'\xff\xfe{"text": ""}': "--input {line}: byte 0 is not UTF-8",
    b'{"text": "a\0"}': "--input {line}: byte 11 is NUL",
    b'{"text": "': "--input {line}: not a JSON object (",
    b'{"text": "first"} {"text": "second"}': "--input {line}: not a JSON object (Extra data",
    b"text": "--input {line}: not a JSON object (",
    b'["text"]': "--input {line}: not a JSON object but a list",
    b'"text"': "--input {line}: not a JSON object but a string",
    b"NaN": "--input {line}: not a JSON object but a number",
    b"null": "--input {line}: not a JSON object but null",
    b'{"x": ' + b"[" * 100_000 + b"}": "--input {line}: nested too deeply",
    b'{"text": "half \\ud83d of"}': "--json-key text: {line}: character 5 of the text is \\ud83d",
    b'{"text": "\\ude00"}': "--json-key text: {line}: character 0 of the text is \\ude00",
    b"{}": "--json-key text: {line}: holds no such key (it has: none)",
    b'{"id": 1, "a\\nb\\ud800": 2}': (
        "--json-key text: {line}: holds no such key (it has: id, a b\\ud800)"
    ),
    b'{"text": 3}': "--json-key text: {line}: holds no text under it but a number",
    b'{"text": null}': "--json-key text: {line}: holds no text under it but null",
    b'{"text": {"text": "nested"}}': "--json-key text: {line}: holds no text under it but an object",
    b'{"text": ["a", "b"]}': "--json-key text: {line}: holds no text under it but a list",
    b'{"text": true}': "--json-key text: {line}: holds no text under it but true or false",
}  # fmt: skip
ODD_BUT_GOOD = [
    b'\xef\xbb\xbf{"text": "byte-order mark"}\n',
    b'{"text": "CR LF"}\r\n',
    b"\r\n",
    b'{"text": "other fields", "score": NaN, "most": -Infinity, "id": ' + b"9" * 10_000 + b"}\n",
    b'{"text": "twice", "text": "the last counts"}\n',
    b'{"text": "whole pair \\ud83d\\ude00 and \\u0000"}\n',
    b'{"text": "' + b"long " * 100_000 + b'"}\n',
    b'  {"text": "no newline at the end"}  ',
]
ODD_TEXTS = [
    "byte-order mark", "CR LF", "other fields", "the last counts", "whole pair \U0001f600 and \0",
    "long " * 100_000, "no newline at the end",
]  # fmt: skip


class TestBadLines:
    @pytest.fixture(params=["train_tokenizer", "preprocess_data"])
    def words(self, request, tokenizer_model, tmp_path):
        """A command line of each tool, but for its --input."""
        words = [request.param, "--output-prefix", tmp_path / "out" / "x"]
        if request.param == "preprocess_data":
            words += ["--tokenizer-model", tokenizer_model]
        return [*words, "--input"]

    @pytest.mark.parametrize("line", BAD_LINES)
    def test_is_named(self, line, words, refused, tmp_path):
        file = tmp_path / "lines.jsonl"
        file.write_bytes(b'{"text": "good"}\n\n' + line + b"\n")
        message = refused(*words, file)
        assert message.startswith(BAD_LINES[line].format(line=f"{file}:3"))
        assert "; accepted is " in message
        assert message.endswith("or --skip-bad-lines to leave such lines out")
        assert list((tmp_path / "out").glob("*")) == []

    def test_are_left_out_and_counted(self, preprocess, corpus, tokenizer, tmp_path, capsys):
        file = tmp_path / "lines.jsonl"
        file.write_bytes(b"\n".join([b'{"text": "first"}', *BAD_LINES, b'{"text": "last"}']))
        dataset = IndexedDataset(str(preprocess(file, **{"skip-bad-lines": []})))
        assert decoded(dataset, tokenizer) == ["first", "last"]
        told = capsys.readouterr().out.splitlines()
        assert told[0] == (
            f"left out {len(BAD_LINES)} bad lines; the first: --input {file}:2: byte 3 is not UTF-8"
        )

    def test_are_left_out_and_counted_by_the_tokenizer(self, corpus, tmp_path, capsys):
        file = tmp_path / "lines.jsonl"
        file.write_bytes(b"\n".join(BAD_LINES))
        run_tool(
            "train_tokenizer", "--input", corpus, file, "--skip-bad-lines", "--vocab-size", 400,
            "--output-prefix", tmp_path / "x",
        )  # fmt: skip
        assert capsys.readouterr().out.startswith(f"left out {len(BAD_LINES)} bad lines; ")

    def test_of_a_text_file_are_lines(self, preprocess, tokenizer, tmp_path, capsys):
        file = tmp_path / "text.txt"
        file.write_bytes("first\r\nna\u00efve\n".encode() + b"caf\xe9\nn\0u\0l\nlast")
        dataset = IndexedDataset(str(preprocess(file, **{"skip-bad-lines": []})))
        assert decoded(dataset, tokenizer) == ["first\r\nna\u00efve\nlast"]
        assert f"left out 2 bad lines; the first: --input {file}:3: byte 3" in (
            capsys.readouterr().out
        )

    def test_without_a_good_one_there_is_no_text(self, words, refused, tmp_path):
        file = tmp_path / "lines.jsonl"
        file.write_bytes(b'{"body": "a wrong key"}\n' * 3)
        message = refused(*words, file, "--skip-bad-lines")
        assert message == (
            "--input: there is no text in it (left out 3 bad lines; the first: --json-key text: "
            f"{file}:1: holds no such key (it has: body))"
        )
        assert list((tmp_path / "out").glob("*")) == []

    def test_odd_lines_are_good(self, preprocess, tokenizer, tmp_path):
        file = tmp_path / "lines.jsonl"
        file.write_bytes(b"".join(ODD_BUT_GOOD))
        dataset = IndexedDataset(str(preprocess(file)))
        assert decoded(dataset, tokenizer) == ODD_TEXTS

    def test_tokenizer_learns_from_odd_lines(self, tmp_path):
        file = tmp_path / "lines.jsonl"
        file.write_bytes(b"".join(ODD_BUT_GOOD))
        run_tool("train_tokenizer", "--input", file, "--output-prefix", tmp_path / "x")
        assert (tmp_path / "x.model").stat().st_size > 0


class TestFiles:
    @pytest.mark.parametrize(("suffix", "module"), [(".gz", gzip), (".bz2", bz2), (".xz", lzma)])
    def test_compressed(self, suffix, module, preprocess, tokenizer, tmp_path, refused):
        folder = tmp_path / "folder"
        folder.mkdir()
        packed = module.compress(b'{"text": "first"}\n') + module.compress(b'{"text": "second"}\n')
        (folder / f"a.jsonl{suffix}").write_bytes(packed)
        (folder / f"b.txt{suffix}").write_bytes(module.compress(b"third"))
        dataset = IndexedDataset(str(preprocess(folder)))
        assert decoded(dataset, tokenizer) == ["first", "second", "third"]

    @pytest.mark.parametrize(
        "content",
        [gzip.compress(b"text" * 99, mtime=0)[:-9], b"text"],
        ids=["cut off", "text"],
    )
    @pytest.mark.parametrize("flags", [(), ("--skip-bad-lines",)])
    def test_that_is_damaged(self, content, flags, refused, tmp_path):
        file = tmp_path / "a.txt.gz"
        file.write_bytes(content)
        message = refused(
            "train_tokenizer", "--input", file, *flags, "--output-prefix", tmp_path / "x"
        )
        assert message.startswith(f"--input {file}: cannot be read (")
        assert list(tmp_path.iterdir()) == [file]

    def test_of_a_compression_that_is_not_read(self, refused, tmp_path):
        file = tmp_path / "a.jsonl.zst"
        file.touch()
        message = refused("train_tokenizer", "--input", file, "--output-prefix", tmp_path / "x")
        assert message.startswith(f"--input {file}: Zstandard is not read here; accepted are ")

    @pytest.mark.parametrize("name", ["A.JSONL", "a.Json", "a.jsonl.GZ"])
    def test_whose_name_is_in_capitals(self, name, preprocess, tokenizer, tmp_path):
        content = b'{"text": "first"}\n{"text": "second"}\n'
        (tmp_path / name).write_bytes(gzip.compress(content) if name.endswith("GZ") else content)
        data = preprocess(tmp_path / name)
        assert decoded(IndexedDataset(str(data)), tokenizer) == ["first", "second"]

    @pytest.mark.parametrize("name", ["part-00000", "a.txt", "a.jsonl.1"])
    def test_of_json_lines_under_another_name(self, name, preprocess, tokenizer, refused, tmp_path):
        text = '\n{"text": "first"}\n{"text": "second"}\n'
        (tmp_path / name).write_text(text)
        message = refused(
            "train_tokenizer", "--input", tmp_path / name, "--output-prefix", tmp_path / "x"
        )
        assert message.startswith(f"--input {tmp_path / name}: it begins with a JSON object that ")
        data = preprocess(tmp_path / name, key="other")
        assert decoded(IndexedDataset(str(data)), tokenizer) == [text]

    def test_that_is_a_pipe(self, refused, tmp_path):
        os.mkfifo(tmp_path / "pipe.jsonl")
        message = refused(
            "train_tokenizer", "--input", tmp_path / "pipe.jsonl", "--output-prefix", tmp_path / "x"
        )
        assert message.startswith(f"--input {tmp_path}/pipe.jsonl: a pipe or a device, no file; ")

    def test_that_is_no_text(self, refused, corpus, tmp_path):
        message = refused(
            "train_tokenizer", "--input", corpus / "picture.png", "--output-prefix", tmp_path / "x"
        )
        assert message.startswith(f"--input {corpus}/picture.png:1: byte 0 is not UTF-8; ")


@pytest.fixture
def library(tmp_path, monkeypatch):
    """A stand-in for the standard library: 60 modules and what must be left out."""
    folder = tmp_path / "lib"
    for name in ("test", "site-packages/dependency"):
        (folder / name).mkdir(parents=True)
        (folder / name / "left_out.py").write_text("LEFT OUT\n")
    (folder / "latin1.py").write_bytes(b"# coding: latin-1\n# \xe9\n")
    (folder / "empty.py").touch()
    for i in range(60):
        body = f"def function_{i}(argument):\n    return argument * {i} + offset\n\n"
        (folder / f"module_{i}.py").write_text(body * 8)
    monkeypatch.setattr(tool("prepare_demo_data"), "standard_library", lambda: folder)
    return folder


class TestDemoData:
    def names(self, file):
        return {json.loads(line)["name"] for line in file.read_text().splitlines()}

    def test_splits_whole_modules(self, library, tmp_path):
        data = tool("prepare_demo_data").prepare(tmp_path / "data", vocab_size=320)
        train, valid = self.names(data.text("train")), self.names(data.text("valid"))
        assert len(valid) > 0
        assert train.isdisjoint(valid)
        assert train | valid == {f"module_{i}.py" for i in range(60)}
        assert len(IndexedDataset(str(data.train))) == len(train)
        assert len(IndexedDataset(str(data.valid))) == len(valid)

    def test_refused_flag_leaves_what_there_was(self, library, tmp_path):
        prepare = tool("prepare_demo_data").prepare
        data = prepare(tmp_path / "data", vocab_size=320)
        before = {file: file.stat().st_mtime_ns for file in (tmp_path / "data").iterdir()}
        for wrong in ({"vocab_size": 10}, {"vocab_size": 320, "every": 60}):
            with pytest.raises(UsageError, match=r"^--(vocab-size|every)"):
                prepare(data.folder, **wrong)
        assert {file: file.stat().st_mtime_ns for file in data.folder.iterdir()} == before

    def test_does_nothing_when_up_to_date(self, library, tmp_path):
        data = tool("prepare_demo_data").prepare(tmp_path / "data", vocab_size=320)
        before = {file: file.stat().st_mtime_ns for file in data.files()}
        tool("prepare_demo_data").prepare(tmp_path / "data", vocab_size=320)
        assert {file: file.stat().st_mtime_ns for file in data.files()} == before

    @pytest.mark.parametrize("change", ["source", "flag", "damage"])
    def test_starts_again_when_something_changed(self, change, library, tmp_path):
        prepare = tool("prepare_demo_data").prepare
        data = prepare(tmp_path / "data", vocab_size=320)
        before = data.stamp.stat().st_mtime_ns
        if change == "source":
            (library / "module_0.py").write_text("changed = True\n")
        if change == "damage":
            data.tokenizer.write_bytes(b"")
        prepare(tmp_path / "data", vocab_size=330 if change == "flag" else 320)
        assert data.stamp.stat().st_mtime_ns > before
        assert data.tokenizer.stat().st_size > 0
