"""What happens to a job when something happens to it, and that the same command goes on."""

import contextlib
import os
import re
import shutil
import signal
import subprocess
import time

import pytest

from tests.faults.jobs import INTERVAL, ITERATIONS, TIMEOUT_S, Job, Outcome

END_OF_OTHERS_S = 45
"""How long torchrun lets a rank end (30 s), and what a rank waits so that another may speak."""


def goes_on(job: Job, whole, *flags: str, saved: int = INTERVAL) -> Outcome:
    """Start the same command once more: it is complete, and every loss is that of a whole run."""
    assert job.tracker() in ("", str(saved)) or flags
    back = job.run("none", *flags)
    assert back.status == 0, back.screen.text[-3000:]
    iterations = [int(n) for n in re.findall(r" iteration +(\d+)/", back.screen.text)]
    assert iterations == list(range(saved + 1, ITERATIONS + 1))
    assert job.losses() == whole
    assert job.tracker() == str(ITERATIONS)
    return back


def test_one_rank_is_killed_in_a_step(job, whole, row):
    end = job.run("killed_in_a_step")

    assert end.status == 1
    assert end.screen.last_line.startswith("rank 1 on ")
    assert "was ended by a signal" in end.screen.last_line
    assert end.to_end_s < 10
    row("rank killed in a step", "3", end, goes_on(job, whole), end.screen.last_line)


def test_one_rank_is_killed_in_a_synchronous_save(job, whole, row):
    end = job.run("killed_in_a_save")

    assert end.status == 1
    assert job.saved() == [3, 6]  # the second is half-written
    assert end.screen.last_line.startswith("rank 1 on ")
    assert end.to_end_s < 10
    row("rank killed in a save", "3", end, goes_on(job, whole), end.screen.last_line)


ASYNC = ("--async-save", "--distributed-timeout-seconds-after-init", "120")
"""The writer imports Megatron, and the first save waits for it."""


def test_one_rank_is_killed_in_an_asynchronous_save(job, whole, row):
    end = job.run("killed_in_an_asynchronous_save", *ASYNC)

    assert end.status == 1
    assert end.screen.last_line.startswith("rank 1 on ")
    assert end.to_end_s < 10
    back = goes_on(job, whole, *ASYNC)
    row("rank killed in an asynchronous save", "3", end, back, end.screen.last_line)


def test_the_process_that_writes_is_killed(job, whole, row):
    end = job.run("writer_killed", *ASYNC)

    assert end.status == 1
    assert "the process that writes the checkpoints of rank 1 has ended" in end.screen.last_line
    assert end.to_end_s < END_OF_OTHERS_S
    back = goes_on(job, whole, *ASYNC)
    row("asynchronous writer killed", "3", end, back, end.screen.last_line)


@pytest.mark.parametrize("flags", [(), ASYNC], ids=["synchronous", "asynchronous"])
def test_a_rank_may_not_write_more(flags, job, whole, row):
    end = job.run("file_size_limited", *flags)

    assert end.status == 1
    assert f"--save {job.checkpoints}: rank 1 could not write" in end.screen.last_line
    assert end.screen.last_line.endswith("--load goes on from iteration 3")
    assert end.to_end_s < END_OF_OTHERS_S
    back = goes_on(job, whole, *flags)
    row(f"write limit in a save {' '.join(flags[:1])}", "3", end, back, end.screen.last_line)


@pytest.mark.skipif(os.geteuid() != 0, reason="mounting a small tmpfs takes root")
def test_the_disk_is_full(job, whole, row):
    job.checkpoints.mkdir()
    mounted = subprocess.run(
        ["mount", "-t", "tmpfs", "-o", "size=1200k", "tmpfs", str(job.checkpoints)]
    )
    if mounted.returncode:
        pytest.skip("mount is not allowed here")
    try:
        end = job.run()
        assert end.status == 1
        assert "No space left on device" in end.screen.last_line
        assert end.screen.last_line.endswith("--load goes on from iteration 3")
        subprocess.run(["mount", "-o", "remount,size=50m", str(job.checkpoints)], check=True)
        row("disk full in a save", "3", None, goes_on(job, whole), end.screen.last_line)
    finally:
        subprocess.run(["umount", str(job.checkpoints)], check=True)


def test_the_disk_is_full_at_the_last_word(job, whole, row):
    end = job.run("tracker_not_written", FAULT_RANK="0")

    assert end.status == 1
    assert "No space left on device" in end.screen.last_line
    assert job.tracker() == ""
    back = goes_on(job, whole, saved=6)  # which was complete
    row("disk full as the tracker is written", "6", end, back, end.screen.last_line)


def damaged(job: Job, act) -> None:
    """Two checkpoints, of which ``act`` spoils the last one."""
    assert job.run("none", "--exit-interval", str(2 * INTERVAL)).status == 0
    act(job.shard(2 * INTERVAL))


def cut(file) -> None:
    with open(file, "r+b") as stream:
        stream.truncate(5000)


def flip(file) -> None:
    with open(file, "r+b") as stream:
        stream.seek(file.stat().st_size // 2)
        byte = stream.read(1)[0]
        stream.seek(-1, os.SEEK_CUR)
        stream.write(bytes([byte ^ 1]))


@pytest.mark.parametrize(
    ("act", "told"), [(cut, "is truncated (5000 of "), (flip, "another checksum than")]
)
def test_a_shard_is_damaged(act, told, job, whole, row):
    damaged(job, act)

    end = job.run()
    assert end.status == 1
    assert told in end.screen.last_line
    assert "accepted: --ckpt-step 3" in end.screen.last_line

    back = goes_on(job, whole, "--scmoe-damaged-checkpoint", "skip")
    assert (job.checkpoints / "iter_0000006.damaged").is_dir()
    assert re.search(r"^WARNING: .*it is iter_0000006.damaged now; .*0003$", back.screen.text, re.M)
    row(f"a shard: {act.__name__}", "3", None, back, end.screen.last_line)


@pytest.mark.parametrize("fault", ["hung", "stopped"])
def test_a_rank_does_not_go_on(fault, job, whole, row):
    end = job.run(fault)

    assert end.status == 1
    assert end.screen.last_line.startswith("faulty_pretrain.py: error: ")
    assert "rank 1 on " in end.screen.last_line
    assert ("hangs in iteration 6, at " if fault == "hung" else "silent") in end.screen.last_line
    assert end.to_end_s < TIMEOUT_S + END_OF_OTHERS_S
    row(f"a rank that is {fault}", "3", end, goes_on(job, whole), end.screen.last_line)


def test_a_loss_is_nan(job, whole, row):
    end = job.run("nan", "--rerun-mode", "disabled")

    assert end.status == 1
    assert "error: Rank 1, node " in end.screen.last_line
    assert "Unexpected result nan" in end.screen.last_line
    assert end.to_end_s < END_OF_OTHERS_S
    row("NaN on one rank", "3", end, goes_on(job, whole), end.screen.last_line)


def test_half_a_folder_and_stale_locks_are_written_over(job, whole, row):
    assert job.run("none", "--exit-interval", str(INTERVAL)).status == 0
    half = job.checkpoints / "iter_0000006"
    half.mkdir()
    (half / "__0_0.distcp").write_bytes(b"half")
    (half / "__7_0.distcp").write_bytes(b"of another layout")
    (job.checkpoints / ".lock").touch()
    for index in sorted((job.folder / "cache").rglob("*.npy"))[:1]:
        with open(index, "r+b") as stream:
            stream.truncate(40)

    back = goes_on(job, whole)
    assert "is cut off; it is built anew" in back.screen.text
    row("half-written folder, cut index, stale lock", "3", None, back)


def test_the_data_is_replaced(job, whole, tmp_path, row):
    from tests.small_run import write_dataset

    own = write_dataset(tmp_path / "own")
    job = Job(tmp_path, own)
    assert job.run("none", "--exit-interval", str(INTERVAL)).status == 0
    kept = shutil.copytree(tmp_path, tmp_path.with_name("kept"))
    write_dataset(own, seed=2)

    end = job.run()
    assert end.status == 1
    assert f"the data {own}: its files are not those that" in end.screen.last_line

    for suffix in (".bin", ".idx"):
        shutil.copy(kept / f"own{suffix}", tmp_path)
    back = goes_on(job, whole)
    row("data replaced", "3, with the old data", None, back, end.screen.last_line)


def test_clocks_disagree(job, whole, row):
    assert job.run("clock_an_hour_ahead", "--exit-interval", str(INTERVAL)).status == 0
    ahead = time.time() + 3600
    for file in job.folder.rglob("*"):
        os.utime(file, (ahead, ahead))

    row("one clock an hour ahead", "3", None, goes_on(job, whole))


@pytest.mark.parametrize("number", ["SIGTERM", "SIGUSR1"])
@pytest.mark.parametrize("flags", [(), ASYNC], ids=["synchronous", "asynchronous"])
def test_a_signal_twice(flags, number, job, whole, row):
    """To every process but torchrun, as Slurm sends it; the second while the first is obeyed."""
    import psutil

    def twice(process, screen):
        while " iteration        4/" not in screen.text:
            time.sleep(0.02)
        for _ in range(2):
            for helper in psutil.Process(process.pid).children(recursive=True):
                with contextlib.suppress(psutil.NoSuchProcess):
                    helper.send_signal(getattr(signal, number))
            time.sleep(0.05)

    words = ("--exit-signal-handler", "--exit-signal", number, "--num-workers", "2", *flags)
    end = job.run("none", *words, during=twice)

    assert end.status == 0, end.screen.text[-3000:]
    assert "resource_tracker" not in end.screen.text
    saved = job.saved()[-1]
    assert 4 <= saved < ITERATIONS
    back = goes_on(job, whole, *flags, saved=saved)
    row(f"{number} twice {' '.join(flags[:1])}", "the step it came in", None, back)
