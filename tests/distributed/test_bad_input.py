"""Bad input and dying ranks, through the pretraining script.

A file that cannot serve is one line and status 2. A rank that dies takes the others with it at once,
and leaves neither a process nor a checkpoint that would be loaded half.
"""

import functools
import os
import re
import shutil
import signal
import tempfile
from pathlib import Path

import psutil
import pytest

from megatron_scmoe.platform.launch import free_port
from tests import harness, small_run
from tests.small_run import EP2

TRACKER = "latest_checkpointed_iteration.txt"
FLAGS = [
    *small_run.MODEL,
    *small_run.STEPS,
    *("--attention-dropout", "0", "--hidden-dropout", "0", "--global-batch-size", "8"),
    *("--train-iters", "5", "--distributed-timeout-minutes", "1"),
]
CALLS_PER_STEP = 2  # of forward_step: 8 sequences a step, 2 a micro-batch, on 2 ranks


@pytest.fixture(scope="module")
def dataset(tmp_path_factory) -> Path:
    return small_run.write_dataset(tmp_path_factory.mktemp("data") / "text")


@pytest.fixture
def own_dataset(dataset, tmp_path) -> Path:
    """A copy, to be damaged."""
    for suffix in (".bin", ".idx"):
        shutil.copy(dataset.with_suffix(suffix), tmp_path)
    return tmp_path / dataset.name


def flags(dataset: Path, folder: Path | None = None) -> list[str]:
    words = [*FLAGS, "--train-data-path", str(dataset)]
    if folder is None:
        return words
    return [*words, "--save", str(folder), "--load", str(folder), "--save-interval", "2"]


@pytest.fixture(scope="module")
def undisturbed(dataset, tmp_path_factory):
    """A run of 5 steps on 2 ranks, and its folder with the checkpoints of steps 2, 4 and 5."""
    folder = tmp_path_factory.mktemp("undisturbed")
    run = harness.run_pretrain([*flags(dataset, folder), *EP2], world_size=2)
    assert run.status == 0, run.output
    assert sorted(run.losses) == [1, 2, 3, 4, 5]
    return run, folder


def damage(file: Path, offset: int, content: bytes = b"") -> None:
    """Overwrite bytes; without any, cut the file there."""
    with open(file, "r+b") as stream:
        stream.seek(offset)
        stream.write(content) if content else stream.truncate()


class TestFiles:
    def refusal(self, *words) -> str:
        run = harness.run_pretrain(list(words))
        assert run.status == 2
        assert "Traceback" not in run.output
        assert run.output.count(" error: ") == 1
        return run.error

    def test_missing_data(self, tmp_path):
        message = self.refusal(*flags(tmp_path / "nowhere"))
        assert message.startswith(f"--train-data-path {tmp_path}/nowhere: there is no file ")

    def test_truncated_data(self, own_dataset):
        damage(own_dataset.with_suffix(".bin"), 3000)
        message = self.refusal(*flags(own_dataset))
        assert f"{own_dataset}.bin has 3000 bytes, and 4000 by its .idx file" in message

    def test_corrupt_index(self, own_dataset):
        damage(own_dataset.with_suffix(".idx"), 0, b"\0" * 20)
        assert f"{own_dataset}.idx does not begin like" in self.refusal(*flags(own_dataset))

    def test_split_that_leaves_a_part_empty(self, dataset):
        message = self.refusal(*FLAGS, "--data-path", str(dataset))
        assert "falls to the test part of --split 969, 30, 1" in message

    def test_assertion_of_megatron_without_a_message(self, dataset, tmp_path):
        intervals = ("--log-memory-interval", "15", "--log-interval", "10")
        message = self.refusal(*flags(dataset), *intervals)
        assert message.startswith("--log-memory-interval 15, --log-interval 10: ")
        assert message.endswith("it must hold that --log-memory-interval % --log-interval == 0")

    def test_tokenizer_that_is_too_small(self, dataset):
        message = self.refusal(*flags(dataset), "--vocab-size", "100")
        assert f"of {dataset}.bin has the id " in message
        assert message.endswith("data with ids from 0 to 99")

    def test_file_that_is_no_tokenizer(self, dataset):
        tokenizer = ("--tokenizer-type", "SentencePieceTokenizer", "--tokenizer-model")
        message = self.refusal(*flags(dataset), *tokenizer, f"{dataset}.bin")
        assert f"--tokenizer-model {dataset}.bin: it cannot be loaded" in message

    def test_folder_that_cannot_be_written(self, dataset):
        folder = dataset.with_suffix(".bin") / "checkpoints"
        assert f"--save {folder}: cannot write there" in self.refusal(*flags(dataset, folder))

    def test_truncated_checkpoint_and_its_remedy(self, dataset, undisturbed, tmp_path):
        folder = shutil.copytree(undisturbed[1], tmp_path / "copy")
        damage(folder / "iter_0000005" / "__1_0.distcp", 5000)
        damage(folder / "iter_0000004" / ".metadata", 5000)
        message = self.refusal(*flags(dataset, folder))
        assert f"{folder}/iter_0000005/__1_0.distcp is truncated (5000 of " in message

        remedy = re.search("accepted: (--ckpt-step [0-9]+)", message)[1].split()
        run = harness.run_pretrain([*flags(dataset, folder), *EP2, *remedy], world_size=2)
        assert_continues_after_step_2(run, undisturbed[0])


def test_another_model_is_refused_without_burying_the_reason(dataset, undisturbed):
    words = [*flags(dataset, undisturbed[1]), *EP2, "--scmoe-tap", "pos1"]
    run = harness.run_pretrain(words, world_size=2)
    assert run.status == 2
    assert run.error.startswith("--scmoe-tap pos1: ")
    assert len(run.output.splitlines()) < 40


def test_a_finished_run_says_so_and_leaves_its_checkpoint_alone(dataset, undisturbed):
    metadata = undisturbed[1] / "iter_0000005" / ".metadata"
    before = metadata.stat()
    run = harness.run_pretrain([*flags(dataset, undisturbed[1]), *EP2], world_size=2)
    assert run.status == 0, run.output
    assert "> nothing is left to train: " in run.output
    assert "has 5 iterations, and --train-iters is 5" in run.output
    assert (metadata.stat().st_ino, metadata.stat().st_mtime) == (before.st_ino, before.st_mtime)


@pytest.mark.parametrize("moment", ["in mid-step", "in mid-save"])
def test_rank_that_dies(moment, dataset, undisturbed, tmp_path):
    folder = tmp_path / "checkpoints"
    words = [*flags(dataset, folder), *EP2]
    statuses, output = run_until_death(words, moment)
    assert -signal.SIGKILL in statuses
    assert None not in statuses, f"a rank went on without the other:\n{output}"
    assert 0 not in statuses
    assert (folder / TRACKER).read_text() == "2"

    run = harness.run_pretrain(words, world_size=2)
    assert_continues_after_step_2(run, undisturbed[0])
    assert (folder / TRACKER).read_text() == "5"


def test_bug_in_a_step_keeps_its_traceback(dataset):
    """A ValueError of the loop is no refusal, though Megatron refuses arguments with ValueErrors."""
    statuses, output = run_until_death([*flags(dataset), *EP2], "with a bug")
    assert statuses[1] == 1
    assert "Traceback (most recent call last)" in output
    assert "ValueError: a bug" in output
    assert " error: " not in output.partition("ValueError: a bug")[0]


def assert_continues_after_step_2(run, undisturbed) -> None:
    assert run.status == 0, run.output
    assert sorted(run.losses) == [3, 4, 5]
    for step in run.losses:
        assert run.losses[step] == undisturbed.losses[step]


def run_until_death(words: list[str], moment: str) -> tuple[list[int | None], str]:
    """Run on 2 ranks, one of which kills itself. Returns the exit statuses and all output.

    A status is None where a rank was still running 5 s after the other's death.
    """
    with tempfile.TemporaryDirectory() as folder:
        log = Path(folder) / "log"
        port = free_port()
        processes = [
            harness._context.Process(
                target=_pretrain_and_die, args=(moment, rank, 2, port, words, str(log))
            )
            for rank in range(2)
        ]
        statuses = harness._join(processes, harness.TIMEOUT_S)
        left = [p for p in psutil.process_iter() if _is_of_run(p, port)]
        for process in left:
            process.kill()
        assert not left, "processes outlived the ranks that had started them"
        return statuses, log.read_text()


def _is_of_run(process: psutil.Process, port: int) -> bool:
    try:
        return process.environ().get("MASTER_PORT") == str(port)
    except psutil.Error:
        return False


def _pretrain_and_die(moment: str, rank: int, *args) -> None:
    from megatron_scmoe.training import pretrain

    module, name, calls = {
        "in mid-step": (pretrain, "forward_step", 3 * CALLS_PER_STEP),
        "with a bug": (pretrain, "forward_step", 3 * CALLS_PER_STEP),
        "in mid-save": (os, "fsync", 2),  # of the second save: its data is not on the disk yet
    }[moment]
    if rank == 1:
        end = _raise if moment == "with a bug" else _kill
        setattr(module, name, _end_at_call(calls, getattr(module, name), end))
    harness._pretrain(rank, *args)


def _kill() -> None:
    os.kill(os.getpid(), signal.SIGKILL)


def _raise() -> None:
    raise ValueError("a bug")


def _end_at_call(last: int, function, end):
    calls = iter(range(1, last + 1))

    @functools.wraps(function)
    def wrapper(*args, **kwargs):
        if next(calls) == last:
            end()
        return function(*args, **kwargs)

    return wrapper
