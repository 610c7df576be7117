"""Every file and folder that a flag can name, damaged one at a time."""

import functools
import json
import os
import pickle
import re
import shutil
import struct
from argparse import ArgumentParser, Namespace
from pathlib import Path

import numpy as np
import pytest
import torch
from megatron.core import dist_checkpointing
from megatron.core.datasets.indexed_dataset import DType, IndexedDatasetBuilder
from megatron.core.dist_checkpointing import ShardedTensor
from megatron.core.tokenizers.utils.build_tokenizer import build_tokenizer
from megatron.training.arguments import add_megatron_arguments

from megatron_scmoe.platform.megatron_flags import add_run_args
from megatron_scmoe.training import input_checks

VOCAB = 100
STEPS = (10, 20, 30)
TRACKER = "latest_checkpointed_iteration.txt"


OF_PARTS = {
    *("--train-data-path", "--valid-data-path", "--test-data-path"),
    "--per-split-data-args-path",
}
"""With which Megatron takes no --split."""


@pytest.fixture
def parse():
    """Megatron's own parse of a command line, with a tokenizer of 100 ids, on the first rank."""

    def run(*flags, rank=0):
        usual = f"--tokenizer-type NullTokenizer --vocab-size {VOCAB}".split()
        if not OF_PARTS.intersection(flags):
            usual += ["--split", "1,0,0"]
        args = parser().parse_args([*usual, *(str(flag) for flag in flags)])
        args.rank = rank
        return args

    return run


@functools.cache
def parser() -> ArgumentParser:
    return add_run_args(add_megatron_arguments(ArgumentParser(allow_abbrev=False)))


@pytest.fixture
def refused(parse):
    """The one line with which a command line is refused."""

    def run(*flags):
        args = parse(*flags)
        with pytest.raises(input_checks.InputError) as caught:
            input_checks.check_files(args)
            input_checks.check_tokens(args, build_tokenizer(args))
        message = str(caught.value)
        assert "\n" not in message
        return message

    return run


@pytest.fixture
def accepted(parse):
    def run(*flags, rank=0):
        args = parse(*flags, rank=rank)
        input_checks.check_files(args)
        input_checks.check_tokens(args, build_tokenizer(args))

    return run


def write_dataset(prefix, documents, dtype=np.uint16) -> Path:
    builder = IndexedDatasetBuilder(f"{prefix}.bin", dtype=dtype)
    for document in documents:
        builder.add_document(np.array(document, dtype=dtype), [len(document)])
    builder.finalize(f"{prefix}.idx")
    return Path(prefix)


@pytest.fixture
def data(tmp_path) -> Path:
    """Prefix of a whole dataset: 5 documents of 20 tokens, ids 0 to 99."""
    return write_dataset(tmp_path / "data", np.arange(VOCAB).reshape(5, 20))


def cut(file: Path, size: int = -1) -> None:
    """Keep the first ``size`` bytes, by default all but the last."""
    content = file.read_bytes()
    file.write_bytes(content[:size])


def overwrite(file: Path, offset: int, content: bytes) -> None:
    with open(file, "r+b") as stream:
        stream.seek(offset, os.SEEK_SET if offset >= 0 else os.SEEK_END)
        stream.write(content)


class TestDataset:
    def test_whole(self, accepted, data):
        accepted("--data-path", data)

    @pytest.mark.parametrize("dtype", [d.name for d in DType if "float" not in d.name])
    def test_every_type_of_token(self, dtype, accepted, tmp_path):
        accepted("--data-path", write_dataset(tmp_path / "d", [[1, 2, 99]], getattr(np, dtype)))

    def test_mock_data_needs_no_file(self, accepted):
        accepted("--mock-data")

    def test_no_data(self, refused):
        message = refused()
        assert message.startswith("no data is given: ")
        assert message.endswith("or --mock-data")

    @pytest.mark.parametrize("suffix", [".bin", ".idx"])
    def test_missing_file(self, suffix, refused, data):
        file = data.with_suffix(suffix)
        file.unlink()
        assert f"--data-path {data}: there is no file {file};" in refused("--data-path", data)

    @pytest.mark.parametrize(("size", "tokens"), [(-1, "199"), (40, "40"), (0, "0")])
    def test_truncated_data(self, size, tokens, refused, data):
        cut(data.with_suffix(".bin"), size)
        message = refused("--data-path", data)
        assert f"{data}.bin has {tokens} bytes, and 200 by its .idx file" in message

    def test_data_with_something_appended(self, refused, data):
        with open(data.with_suffix(".bin"), "ab") as stream:
            stream.write(b"more")
        assert "has 204 bytes, and 200 by" in refused("--data-path", data)

    # The header is 34 bytes: magic 0, version 9, type 17, sequences 18, boundaries 26. Then come 5
    # lengths (int32) at 34, 5 starts (int64) at 54 and 6 boundaries (int64) at 94.
    @pytest.mark.parametrize(
        ("offset", "content", "flaw"),
        [
            (0, b"X", "does not begin like an index"),
            (9, struct.pack("<Q", 2), "has version 2, not 1"),
            (17, b"\x63", "has the data type 99"),
            (18, struct.pack("<Q", 0), "has no sequence"),
            (18, struct.pack("<Q", 6), "has 142 bytes, and 154 by its header"),
            (18, struct.pack("<Q", 1 << 60), "has 142 bytes, and"),
            (34 + 4, struct.pack("<i", 19), "has entries that do not agree"),
            (34 + 4, struct.pack("<i", -20), "has entries that do not agree"),
            (34 + 4 * 4, struct.pack("<i", 10), "has 200 bytes, and 180 by its .idx file"),
            (54 + 8 * 2, struct.pack("<q", 4), "has entries that do not agree"),
            (54, struct.pack("<q", 2), "has entries that do not agree"),
            (94 + 8 * 5, struct.pack("<q", 4), "has entries that do not agree"),
        ],
    )
    def test_corrupt_index(self, offset, content, flaw, refused, data):
        overwrite(data.with_suffix(".idx"), offset, content)
        message = refused("--data-path", data)
        assert message.startswith(f"--data-path {data}: {data}.")
        assert flaw in message

    @pytest.mark.parametrize("size", [-1, 60, 34, 33, 9, 0])
    def test_truncated_index(self, size, refused, data):
        cut(data.with_suffix(".idx"), size)
        assert f"--data-path {data}: {data}.idx " in refused("--data-path", data)

    def test_folder_without_room_for_the_sample_order(self, refused, data, monkeypatch):
        monkeypatch.setattr(os, "access", lambda path, mode: mode != os.W_OK)
        assert "accepted: --data-cache-path FOLDER" in refused("--data-path", data)


class TestSplit:
    @pytest.mark.parametrize(
        "split", ["969,30,1", "60, 40 ,0", " 6/4", "6 4", ".6,.4", "0,1,0", "1"]
    )
    def test_every_part_has_documents(self, split, accepted, tmp_path):
        data = write_dataset(tmp_path / "d", np.ones((1000, 2)))
        accepted("--data-path", data, "--split", split)

    @pytest.mark.parametrize(
        ("split", "part", "nearest"),
        [
            ("969,30,1", "valid", "4,1,0"),
            ("8,1,1", "valid", "8,1,0"),
            ("6,4,0.1", "test", "6,4,0"),
            (" 60 , 39, 1", "test", "60,39,0"),
            ("0,1,0.01", "test", "4,1,0"),
            ("60/39/1", "test", "60,39,0"),
            ("1,0,0.01", "test", "4,1,0"),
        ],
    )
    def test_a_part_has_none(self, split, part, nearest, refused, accepted, data):
        blend = ("--data-path", "0.5", data, "0.5", data)
        message = refused(*blend, f"--split={split}")
        assert message == (
            f"--data-path {data}: no token of its 5 sequences falls to the {part} part of "
            f"--split {split}; accepted: more documents, or --split {nearest}"
        )
        accepted(*blend, "--split", nearest)

    def test_a_part_of_the_smallest_dataset_has_none(self, refused, accepted, data, tmp_path):
        blend = ("--data-path", write_dataset(tmp_path / "large", np.ones((1000, 2))), data)
        message = refused(*blend, "--split", "969,30,1")
        assert message.endswith("or --split 4,1,0")
        accepted(*blend, "--split", "4,1,0")

    @pytest.mark.parametrize("documents", [[[1, 2, 3]], [[1, 2], []]])
    def test_a_document_cannot_be_split(self, documents, refused, accepted, tmp_path):
        data = write_dataset(tmp_path / "d", documents)
        message = refused("--data-path", data, "--split", "969,30,1")
        assert message.endswith("accepted: more documents, or --split 1,0,0 --eval-iters 0")
        accepted("--data-path", data, "--split", "1,0,0", "--eval-iters", "0")

    def test_a_part_has_empty_documents(self, refused, tmp_path):
        data = write_dataset(tmp_path / "d", [[1], [2], [3], []])
        assert "falls to the valid part" in refused("--data-path", data, "--split", "3,1")

    def test_default(self, parse, data):
        args = parse("--data-path", data)
        args.split = None
        with pytest.raises(input_checks.InputError, match=r"part of --split 969, 30, 1;"):
            input_checks.check_files(args)

    def test_flags_of_each_split_take_all(self, accepted, tmp_path):
        data = write_dataset(tmp_path / "d", [[1]])
        accepted("--train-data-path", data, "--valid-data-path", data)

    def test_data_of_parts_is_not_split(self, refused, data, tmp_path):
        message = refused("--train-data-path", data, "--split", "50,25,25")
        assert message == (
            "--split 50,25,25 with --train-data-path: that names the data of each part; accepted: "
            "one of them"
        )
        file = tmp_path / "splits.json"
        assert refused("--per-split-data-args-path", file, "--split", "1,0,0").startswith(
            "--split 1,0,0 with --per-split-data-args-path: "
        )

    @pytest.mark.parametrize(
        "split",
        ["", "all", "0,0,0", "1,2,3,4", "1..2", "9,x,1", "9,,1", "1e-1,9", "-9,1", "9O,1,0"],
    )
    def test_that_is_none(self, split, refused, data):
        message = refused("--data-path", data, f"--split={split}")
        assert message == f"--split {split}: cannot be parsed; accepted: shares such as 969,30,1"


class TestWhatNamesADataset:
    @pytest.mark.parametrize("split", ["train", "valid", "test"])
    def test_flag_of_a_split(self, split, refused, accepted, data, tmp_path):
        train = ("--train-data-path", data) if split != "train" else ()
        accepted(*train, f"--{split}-data-path", data)
        missing = tmp_path / "missing"
        message = refused(*train, f"--{split}-data-path", data, missing, data)
        assert message.startswith(f"--{split}-data-path {missing}: there is no file {missing}.idx")

    @pytest.mark.parametrize("split", ["valid", "test"])
    def test_nothing_to_train_on(self, split, refused, accepted, data):
        message = refused(f"--{split}-data-path", data)
        assert message.startswith(f"--{split}-data-path {data}: there is nothing to train on;")
        accepted(f"--{split}-data-path", data, "--skip-train")

    @pytest.mark.parametrize("weight", ["0", "-1", "nan", "inf"])
    def test_weight_by_which_nothing_is_drawn(self, weight, refused, data):
        message = refused("--data-path", "1", data, f"{weight}", data)
        assert message.startswith(f"--data-path: the weight {weight}: nothing is drawn by it")

    def test_blend_with_weights(self, refused, accepted, data, tmp_path):
        accepted("--data-path", "0.3", data, "0.7", data)
        missing = tmp_path / "missing"
        message = refused("--data-path", "0.3", data, "0.7", missing)
        assert message.startswith(f"--data-path {missing}: ")

    def test_blend_without_its_weights(self, refused, data):
        message = refused("--data-path", data, data, "0.7", data)
        assert message.startswith("--data-path: weights and prefixes do not alternate")

    def test_object_storage_needs_a_folder_for_the_index(self, refused, accepted, tmp_path):
        assert refused("--data-path", "s3://bucket/data") == (
            "--data-path s3://bucket/data: its index is copied here, and there is no folder for it; "
            "accepted: --object-storage-cache-path FOLDER with it"
        )
        accepted("--data-path", "s3://bucket/data", "--object-storage-cache-path", tmp_path)

    def test_list_of_prefixes(self, refused, accepted, data, tmp_path):
        file = tmp_path / "list"
        file.write_text(f"0.5 {data}\n0.5 {data}")
        accepted("--data-args-path", file)
        file.write_text(f"{data}x")
        message = refused("--data-args-path", file)
        assert message.startswith(f"--data-args-path {file}: there is no file {data}x.idx")

    def test_list_of_splits(self, refused, accepted, data, tmp_path):
        file = tmp_path / "splits.json"
        flags = ("--per-split-data-args-path", file)
        whole = {"train": [str(data)], "valid": f"1 {data}", "test": None}
        file.write_text(json.dumps(whole))
        accepted(*flags)
        file.write_text(json.dumps(whole | {"valid": [f"{data}x"]}))
        assert f"{' '.join(map(str, flags))}: there is no file {data}x.idx" in refused(*flags)

    @pytest.mark.parametrize("content", ["", "[]", '{"train": []}', "\x00\x01"])
    def test_list_of_splits_that_is_none(self, content, refused, tmp_path):
        file = tmp_path / "splits.json"
        file.write_text(content)
        message = refused("--per-split-data-args-path", file)
        assert message.startswith(f"--per-split-data-args-path {file}: cannot be parsed")
        if "train" in content:
            assert "the key 'valid' is missing" in message

    @pytest.mark.parametrize("flag", ["--data-args-path", "--per-split-data-args-path"])
    def test_missing_list(self, flag, refused, tmp_path):
        message = refused(flag, tmp_path / "nowhere")
        assert message.startswith(f"{flag} {tmp_path}/nowhere: No such file or directory")

    def test_empty_list(self, refused, tmp_path):
        file = tmp_path / "list"
        file.touch()
        message = refused("--data-args-path", file)
        assert message.startswith(f"--data-args-path {file}: cannot be parsed")
        assert message.endswith(
            "accepted: a file with PREFIX ..., or WEIGHT PREFIX ... with a weight for each"
        )

    def test_data_that_is_named_twice(self, refused, data):
        message = refused("--data-path", data, "--valid-data-path", data)
        assert message == (
            "--data-path with --valid-data-path: the data is named twice; accepted: one of them"
        )

    def test_other_ranks_leave_the_files_alone(self, accepted, tmp_path):
        accepted("--data-path", tmp_path / "missing", rank=1)


class TestVocabulary:
    def test_ranks_that_cannot_share_its_rows(self, refused):
        assert refused(
            "--mock-data", "--padded-vocab-size", 301, "--tensor-model-parallel-size", 2
        ) == (
            "--tensor-model-parallel-size 2: the vocabulary has 301 rows, padding included; accepted: "
            "a divisor of 301, or a checkpoint converted with --target-tensor-parallel 2"
        )


class TestTokenizer:
    def test_not_given(self, parse, data):
        args = parse("--data-path", data)
        args.tokenizer_type = None
        with pytest.raises(input_checks.InputError, match=r"^--tokenizer-type is not given: "):
            input_checks.check_files(args)

    @pytest.mark.parametrize("kind", ["SentencePieceTokenizer", "TikTokenizer"])
    def test_missing_file(self, kind, refused, tmp_path):
        model = tmp_path / "nowhere.model"
        flags = ("--tokenizer-type", kind, "--tokenizer-model", model)
        message = refused("--mock-data", *flags)
        assert message.startswith(f"{' '.join(map(str, flags))}: there is no such file")

    def test_file_that_is_not_given(self, refused):
        message = refused("--mock-data", "--tokenizer-type", "SentencePieceTokenizer")
        assert "SentencePieceTokenizer: --tokenizer-model is not given" in message

    @pytest.mark.parametrize(
        "kind", ["SentencePieceTokenizer", "TikTokenizer", "HuggingFaceTokenizer"]
    )
    def test_file_that_is_none(self, kind, refused, data):
        model = data.with_suffix(".bin")
        message = refused("--mock-data", "--tokenizer-type", kind, "--tokenizer-model", model)
        assert f"--tokenizer-model {model}: it cannot be loaded (" in message

    def test_too_small_for_the_data(self, refused, data):
        message = refused("--data-path", data, "--vocab-size", "99")
        assert message.startswith(
            f"--data-path {data}: token 99 of {data}.bin has the id 99, but the vocabulary of "
            "--tokenizer-type NullTokenizer has 99 ids; accepted: "
        )
        assert message.endswith("data with ids from 0 to 98")

    def test_negative_id(self, refused, tmp_path):
        data = write_dataset(tmp_path / "d", [[1, 2], [3, -4]], np.int32)
        assert "token 3 of" in refused("--data-path", data)

    @pytest.mark.parametrize("place", ["beginning", "middle", "end"])
    def test_sample_of_a_large_dataset(self, place, refused, tmp_path, monkeypatch):
        monkeypatch.setattr(input_checks, "SAMPLE", 30)
        tokens = np.zeros((100, 10))
        position = {"beginning": 9, "middle": 500, "end": 990}[place]
        tokens.flat[position] = VOCAB
        data = write_dataset(tmp_path / "d", tokens)
        assert f"token {position} of" in refused("--data-path", data)

    def test_sample_has_a_limit_for_all_datasets_together(self, accepted, data, monkeypatch):
        monkeypatch.setattr(input_checks, "SAMPLE_OF_ALL", 60)
        tokens = np.zeros(VOCAB)
        tokens[30] = VOCAB  # neither among the first, the middle nor the last 10
        write_dataset(data, [tokens])
        accepted("--train-data-path", data, "--valid-data-path", data)


@pytest.fixture(scope="module")
def saved(tmp_path_factory) -> Path:
    """A folder that was a --save, with three complete checkpoints as Megatron writes them."""
    folder = tmp_path_factory.mktemp("saved")
    for step in STEPS:
        (folder / f"iter_{step:07d}").mkdir()
        tensors = {name: torch.full((1000,), step) for name in ("weight", "momentum")}
        dist_checkpointing.save(
            {key: ShardedTensor.from_rank_offsets(key, t) for key, t in tensors.items()}
            | {"iteration": step},
            str(folder / f"iter_{step:07d}"),
        )
    (folder / TRACKER).write_text(str(STEPS[-1]))
    return folder


@pytest.fixture
def folder(saved, tmp_path) -> Path:
    return shutil.copytree(saved, tmp_path / "saved")


def iteration(folder: Path, step: int) -> Path:
    return folder / f"iter_{step:07d}"


class TestCheckpoint:
    FILES = (".metadata", "__0_0.distcp", "metadata.json")

    def test_complete(self, accepted, folder):
        assert sorted(f.name for f in iteration(folder, 30).iterdir()) == list(self.FILES)
        accepted("--mock-data", "--load", folder)
        accepted("--mock-data", "--load", folder, "--ckpt-step", "10")

    def test_of_the_other_format(self, accepted, refused, folder):
        flags = ("--mock-data", "--load", folder, "--ckpt-format", "torch")
        message = refused(*flags)
        assert message.startswith(f"--ckpt-format torch with --load {folder}: {folder}/iter_")
        assert message.endswith("; accepted: --ckpt-format torch_dist, or "
                                "--auto-detect-ckpt-format with it")  # fmt: skip
        accepted(*flags, "--auto-detect-ckpt-format")

    @pytest.mark.parametrize("missing", ["folder", "tracker"])
    def test_none_yet_is_a_first_start(self, missing, accepted, refused, tmp_path):
        folder = tmp_path / "new"
        if missing == "tracker":
            (folder / "data_cache").mkdir(parents=True)
        flags = ("--mock-data", "--load", folder, "--save")
        accepted(*flags, folder)
        accepted(*flags, tmp_path / "." / "new")
        accepted(
            *flags, folder, "--use-checkpoint-args"
        )  # one command for this start and later ones
        nothing = f"--load {folder}: there is no checkpoint (no {folder}/{TRACKER}"
        assert refused(*flags, folder, "--exit-on-missing-checkpoint").startswith(nothing)
        elsewhere = ((*flags, tmp_path / "other"), flags[:-1])
        for given in (*elsewhere, (*flags[:-1], "--use-checkpoint-args")):
            message = refused(*given)
            assert message.startswith(nothing)
            assert "or what --save names: a job begins there" in message

    @pytest.mark.parametrize("name", ["iter_0000020", "release", "copy", "rank"])
    def test_one_iteration_is_no_save(self, name, refused, folder):
        one, accepted = folder / name, f"--load {folder} --ckpt-step 20"
        if name in ("release", "copy"):
            accepted = {"release": f"--load {folder}", "copy": "the folder above it"}[name]
            iteration(folder, 20).rename(one)
        elif name == "rank":  # of Megatron's format "torch"
            one = iteration(folder, 20)
            shutil.rmtree(one)
            (one / "mp_rank_00").mkdir(parents=True)
            (one / "mp_rank_00" / "model_optim_rng.pt").touch()
        for also in ((), ("--save", one), ("--use-checkpoint-args",), ("--ckpt-step", "20")):
            message = refused("--mock-data", "--load", one, *also)
            assert "it is one iteration, not a --save; accepted: " + accepted in message

    def test_an_exported_model_is_no_save(self, refused, tmp_path):
        (tmp_path / "config.json").touch()
        (tmp_path / "model.safetensors").touch()
        for also in ((), ("--save", tmp_path), ("--use-checkpoint-args",)):
            message = refused("--mock-data", "--load", tmp_path, *also)
            assert message.startswith(f"--load {tmp_path}: it is a Hugging Face model; accepted: ")
            assert f"tools/convert.py hf-to-megatron --input {tmp_path} --save FOLDER" in message

    @pytest.mark.parametrize("names", [["config.json"], ["config.json", "adapter_config.json"]])
    def test_a_file_of_the_user_s_beside_what_is_saved_is_no_model(
        self, names, accepted, refused, tmp_path
    ):
        for name in names:
            (tmp_path / name).touch()
        accepted("--mock-data", "--load", tmp_path, "--save", tmp_path)
        message = refused("--mock-data", "--load", tmp_path)
        assert message.startswith(f"--load {tmp_path}: there is no checkpoint (no {tmp_path}/")

    def test_a_lost_tracker_beside_a_release_is_no_first_start(
        self, refused, accepted, folder, tmp_path
    ):
        """What convert and upcycle write is a release, and no iteration."""
        (folder / TRACKER).unlink()
        iteration(folder, 30).rename(folder / "release")
        assert refused("--mock-data", "--load", folder).endswith(f"echo 20 > {folder}/{TRACKER}")
        for step in (10, 20):
            shutil.rmtree(iteration(folder, step))
        for flag, *also in (
            ["--load"],
            ["--load", "--save", tmp_path],
            ["--load", "--use-checkpoint-args"],
            ["--pretrained-checkpoint"],
        ):
            assert refused("--mock-data", flag, folder, *also) == (
                f"{flag} {folder}: {folder}/{TRACKER} is missing; accepted: the name of the complete "
                f"checkpoint in it: echo release > {folder}/{TRACKER}"
            )
        (folder / TRACKER).write_text("release")
        accepted("--mock-data", "--load", folder)
        (folder / TRACKER).unlink()
        (folder / "release" / "metadata.json").unlink()
        accepted("--mock-data", "--load", folder, "--save", folder)

    def test_a_release_is_what_is_left(self, refused, folder):
        shutil.copytree(iteration(folder, 30), folder / "release")
        for step in STEPS:
            cut(iteration(folder, step) / "__0_0.distcp")
        message = refused("--mock-data", "--load", folder)
        assert message.endswith(
            f"accepted: echo release > {folder}/{TRACKER}, the nearest complete checkpoint"
        )

    def test_a_lost_tracker_is_no_first_start(self, refused, accepted, folder, tmp_path):
        """A run with --save there writes it anew (whole_checkpoint.py), which comes before this."""
        (folder / TRACKER).unlink()
        remedy = f"{folder}/{TRACKER} is missing; accepted: .*: echo 30 > {folder}/{TRACKER}"
        for also in ((), ("--save", tmp_path), ("--pretrained-checkpoint", tmp_path)):
            message = refused("--mock-data", "--load", folder, *also)
            assert re.fullmatch(f"--load {folder}: {remedy}", message)
        accepted("--mock-data", "--load", folder, "--ckpt-step", "20")
        message = refused("--mock-data", "--pretrained-checkpoint", folder, "--ckpt-step", "20")
        assert re.fullmatch(f"--pretrained-checkpoint {folder} --ckpt-step 20: {remedy}", message)
        for step in STEPS:  # a first save that was cut off
            (iteration(folder, step) / "metadata.json").unlink()
        accepted("--mock-data", "--load", folder, "--save", folder)

    @pytest.mark.parametrize("name", FILES)
    def test_missing_file(self, name, refused, accepted, folder):
        (iteration(folder, 30) / name).unlink()
        message = refused("--mock-data", "--load", folder)
        assert message.startswith(
            f"--load {folder}: the checkpoint is not complete: {folder}/iter_0000030/{name} is miss"
        )
        assert message.endswith("accepted: --ckpt-step 20, the nearest complete checkpoint")
        accepted("--mock-data", "--load", folder, "--ckpt-step", "20")

    @pytest.mark.parametrize("size", [-1, 100, 0])
    @pytest.mark.parametrize("name", FILES)
    def test_truncated_file(self, name, size, refused, folder):
        if name == "metadata.json" and size == 100:
            size = 10  # it is shorter than that
        cut(iteration(folder, 30) / name, size)
        message = refused("--mock-data", "--load", folder)
        assert f"not complete: {folder}/iter_0000030/{name} is" in message
        assert message.endswith("accepted: --ckpt-step 20, the nearest complete checkpoint")

    @pytest.mark.parametrize("content", ["[]", "[" * 100_000])
    def test_json_without_fields(self, content, refused, folder):
        (iteration(folder, 30) / "metadata.json").write_text(content)
        message = refused("--mock-data", "--load", folder)
        assert f"not complete: {folder}/iter_0000030/metadata.json " in message
        assert message.endswith("accepted: --ckpt-step 20, the nearest complete checkpoint")

    def test_files_of_ranks_beside_a_distributed_checkpoint(self, refused, folder):
        rank = iteration(folder, 30) / "mp_rank_00"
        rank.mkdir()
        torch.save({}, rank / "model_optim_rng.pt")
        cut(iteration(folder, 30) / ".metadata")
        assert ".metadata is unreadable" in refused("--mock-data", "--load", folder)

    def test_says_how_much_is_there(self, refused, folder):
        file = iteration(folder, 30) / "__0_0.distcp"
        size = file.stat().st_size
        cut(file)
        message = refused("--mock-data", "--load", folder)
        assert f"{file} is truncated ({size - 1} of {size} bytes)" in message

    def test_remedy_is_itself_complete(self, refused, folder):
        for step in (30, 20):
            cut(iteration(folder, step) / "__0_0.distcp")
        assert "accepted: --ckpt-step 10," in refused("--mock-data", "--load", folder)

    def test_remedy_may_be_later(self, refused, folder):
        cut(iteration(folder, 10) / "__0_0.distcp")
        message = refused("--mock-data", "--load", folder, "--ckpt-step", "10")
        assert message.startswith(f"--load {folder} --ckpt-step 10: ")
        assert "accepted: --ckpt-step 20," in message

    def test_no_remedy(self, refused, folder):
        for step in STEPS:
            cut(iteration(folder, step) / "__0_0.distcp")
        message = refused("--mock-data", "--load", folder)
        assert message.endswith("accepted: another folder; no checkpoint in this one is complete")

    def test_step_that_is_not_there(self, refused, folder):
        message = refused("--mock-data", "--load", folder, "--ckpt-step", "25")
        assert f"there is no folder {folder}/iter_0000025" in message
        assert "accepted: --ckpt-step 20," in message

    def test_save_that_was_cut_short_is_not_loaded(self, accepted, folder):
        (iteration(folder, 30) / "metadata.json").unlink()
        (folder / TRACKER).write_text("20")
        accepted("--mock-data", "--load", folder)

    @pytest.mark.parametrize("content", ["", "3 0", "-1", "twenty"])
    def test_tracker_without_a_number(self, content, refused, accepted, folder):
        tracker = folder / TRACKER
        tracker.write_text(content)
        message = refused("--mock-data", "--load", folder)
        assert f"{tracker} names no iteration (it holds {content!r})" in message
        assert message.endswith(f"echo 30 > {tracker}")
        tracker.write_text("30\n")
        accepted("--mock-data", "--load", folder)

    def test_release(self, refused, accepted, folder):
        (folder / TRACKER).write_text("release")
        message = refused("--mock-data", "--load", folder)
        assert (
            f"there is no folder {folder}/release; accepted: echo 30 > {folder}/latest_" in message
        )
        shutil.copytree(iteration(folder, 30), folder / "release")
        accepted("--mock-data", "--load", folder)

    def test_pretrained_checkpoint(self, refused, accepted, folder, tmp_path):
        new = tmp_path / "new"
        flags = ("--mock-data", "--load", new, "--save", new, "--pretrained-checkpoint")
        accepted(*flags, folder)
        typo = refused("--mock-data", "--load", new, "--pretrained-checkpoint", folder)
        assert typo.startswith(f"--load {new}: there is no checkpoint")
        assert f"--pretrained-checkpoint {new}: there is no checkpoint" in refused(*flags, new)
        cut(iteration(folder, 30) / "__0_0.distcp")
        assert f"--pretrained-checkpoint {folder}: the checkpoint is" in refused(*flags, folder)

    @pytest.mark.parametrize("name", ["mp_rank_00/model_optim_rng.pt", "common.pt"])
    def test_file_of_an_older_format(self, name, refused, accepted, folder):
        file = iteration(folder, 30) / name
        file.parent.mkdir(exist_ok=True)
        torch.save({"weight": torch.zeros(1000)}, file)
        accepted("--mock-data", "--load", folder)
        cut(file)
        assert f"{file} is truncated" in refused("--mock-data", "--load", folder)

    @pytest.mark.parametrize(
        ("layout", "ranks"),
        [
            (dict(world_size=4), 1),  # all of them replicas
            (dict(world_size=4, tensor=2), 2),
            (dict(world_size=4, tensor=2, expert=2, expert_tensor=1), 2),  # (0, 0) and (1, 1)
            (dict(world_size=8, pipeline=2, expert=4), 8),
        ],
    )
    def test_files_of_an_older_format_are_those_of_all_ranks(
        self, layout, ranks, refused, accepted, tmp_path
    ):
        sizes = {"tensor": 1, "pipeline": 1, "expert": 1} | layout
        world_size, expert_tensor = sizes.pop("world_size"), sizes.pop("expert_tensor", None)
        args = Namespace(
            world_size=world_size,
            expert_tensor_parallel_size=expert_tensor,
            **{f"{part}_model_parallel_size": size for part, size in sizes.items()},
        )
        (tmp_path / TRACKER).write_text("10")
        for rank in range(ranks):
            if rank:
                told = f"{iteration(tmp_path, 10)} has files of {rank} of {ranks} ranks"
                assert told in refused("--mock-data", "--load", tmp_path)
            file = iteration(tmp_path, 10) / f"mp_rank_{rank:02d}" / "model_optim_rng.pt"
            file.parent.mkdir(parents=True)
            torch.save({"args": args}, file)
        accepted("--mock-data", "--load", tmp_path)

    def test_metadata_runs_no_code(self, refused, folder, tmp_path):
        class Harmful:
            def __reduce__(self):
                return Path.touch, (tmp_path / "harm",)

        (iteration(folder, 30) / ".metadata").write_bytes(pickle.dumps(Harmful()))
        assert ".metadata is unreadable (it asks for " in refused("--mock-data", "--load", folder)
        assert not (tmp_path / "harm").exists()


class TestFolder:
    @pytest.mark.parametrize("flag", ["--save", "--data-cache-path", "--tensorboard-dir"])
    def test_that_cannot_be_written(self, flag, refused, tmp_path):
        file = tmp_path / "file"
        file.touch()
        folder = file / "below" / "it"
        message = refused("--mock-data", flag, folder)
        assert message.startswith(f"{flag} {folder}: cannot write there (Not a directory); ")

    def test_on_a_read_only_file_system(self, refused):
        assert "--save /proc/x: cannot write there (" in refused("--mock-data", "--save", "/proc/x")

    def test_nothing_is_left_behind(self, accepted, tmp_path):
        accepted("--mock-data", "--save", tmp_path / "a" / "b")
        assert list(tmp_path.iterdir()) == []
