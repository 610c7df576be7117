"""The data tools, on real text: what Megatron reads back is what was in the files."""

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from megatron.core.datasets.gpt_dataset import GPTDataset, GPTDatasetConfig
from megatron.core.datasets.indexed_dataset import IndexedDataset
from megatron.core.datasets.utils import Split

from megatron_scmoe.command_line import UsageError
from tests.tools import TOOLS, run_tool, tool

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
    return [tokenizer.detokenize(ids.tolist()) for ids in dataset]


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

    def test_sample_is_even_and_within_its_size(self):
        lines = [f"{i:04d}" for i in range(100)]
        assert tool("train_tokenizer").sample_lines(lines, 100) == lines[::4]


class TestPreprocess:
    def test_megatron_reads_back_the_text(self, preprocess, corpus, tokenizer):
        dataset = IndexedDataset(str(preprocess(corpus)))
        assert decoded(dataset, tokenizer) == list(TEXTS.values())

    def test_each_document_ends_with_eod(self, preprocess, corpus, tokenizer):
        plain = [tokenizer.tokenize(text) for text in TEXTS.values()]
        dataset = IndexedDataset(str(preprocess(corpus, **{"append-eod": []})))
        assert [ids.tolist() for ids in dataset] == [[*ids, tokenizer.eod] for ids in plain]
        assert dataset.document_indices.tolist() == [0, 1, 2, 3]

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
        prefix = str(preprocess(corpus, **{"append-eod": []}))
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
        assert message == f"--input {bad}: byte 3 is not UTF-8; accepted is UTF-8 text"
        assert list((tmp_path / "out").iterdir()) == []

    @pytest.mark.parametrize(
        ("line", "expected"),
        [
            ('{"text": 3}', "--json-key text: {file}:2 holds no text under it (it has: text)"),
            ('["text"]', "--json-key text: {file}:2 holds no text under it (it has: list)"),
            ('{"text": "', "--input {file}:2: not a JSON object"),
        ],
    )
    def test_wrong_json_line_is_named(self, line, expected, refused, tokenizer_model, tmp_path):
        file = tmp_path / "lines.jsonl"
        file.write_text(f'{{"text": "good"}}\n{line}\n')
        message = refused(
            "preprocess_data", "--input", file, "--tokenizer-model", tokenizer_model,
            "--output-prefix", tmp_path / "x",
        )  # fmt: skip
        assert message.startswith(expected.format(file=file))

    def test_text_without_a_token(self, refused, tokenizer_model, tmp_path):
        (tmp_path / "empty.txt").touch()
        message = refused(
            "preprocess_data", "--input", tmp_path, "--tokenizer-model", tokenizer_model,
            "--output-prefix", tmp_path / "x", "--append-eod",
        )  # fmt: skip
        assert message == "--input: there is no text in it"

    def test_token_that_does_not_fit_the_data_type(self, tmp_path):
        class Overflowing:
            vocab_size = 65_000  # stored as uint16

            def tokenize(self, text):
                return [1, 70_000]

        document = tool("corpus").Document("big.txt", "text")
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
