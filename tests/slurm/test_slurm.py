"""Jobs of examples/cpu/train.sbatch on a real Slurm, which `make test-slurm` starts on this machine.

Three nodes, of which a job takes two, with a rank on each. All nodes are this machine, so the ranks
meet at its own address (MASTER_ADDR) instead of at the first node's name.
"""

import os
import re
import subprocess
import time
from pathlib import Path

from tests import tensorboard

REPOSITORY = Path(__file__).parents[2]
SBATCH = "examples/cpu/train.sbatch"
SMALL = (
    "--hidden-size 32 --num-attention-heads 2 --ffn-hidden-size 64 --moe-ffn-hidden-size 64"
    " --moe-shared-expert-intermediate-size 64 --seq-length 32 --max-position-embeddings 32"
    " --log-interval 1 --eval-iters 0 --num-workers 0"
).split()
ITERATIONS = 700
"""Long enough for Slurm, which looks at time limits twice a minute."""
END_S = 400
ENDED = ("COMPLETED", "FAILED", "TIMEOUT", "CANCELLED", "NODE_FAIL")


def slurm(*words: str, **variables: str) -> str:
    """The output of one of Slurm's commands."""
    finished = subprocess.run(
        words, cwd=REPOSITORY, env=os.environ | variables, capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    return finished.stdout.strip()


class Job:
    """A job of the recipe in its own folder."""

    def __init__(self, folder: Path, *flags: str, **variables: str):
        self.folder, self.log = folder, folder / "job.log"
        folder.mkdir(exist_ok=True)
        variables |= {"MOCK_DATA": "1", "CHECKPOINT_DIR": str(folder / "run")}
        variables |= {"MASTER_ADDR": "127.0.0.1", "SAVE_INTERVAL": "50", "MICRO_BATCH_SIZE": "2"}
        self.number = slurm(
            *("sbatch", "--parsable", "--time=60", "--signal=B:USR1@60", f"--output={self.log}"),
            *(SBATCH, "--", *SMALL, *flags),
            **{"GLOBAL_BATCH_SIZE": "4", "TRAIN_ITERS": str(ITERATIONS)} | variables,
        )

    def state(self) -> str:
        """Slurm's word for how it is."""
        return re.search(r"JobState=(\w+)", slurm("scontrol", "show", "job", self.number))[1]

    def text(self) -> str:
        """Its output so far."""
        return self.log.read_text() if self.log.exists() else ""

    def iteration(self) -> int:
        """The last that it has logged."""
        found = re.findall(r" iteration +(\d+)/", self.text())
        return int(found[-1]) if found else 0

    def starts(self) -> int:
        """How often Slurm has started it."""
        shown = slurm("scontrol", "show", "job", self.number)
        return 1 + int(re.search(r"Restarts=(\d+)", shown)[1])

    def losses(self) -> dict[int, set[float]]:
        """By iteration; more than one where a start has repeated it with another loss."""
        return tensorboard.losses(self.folder / "run" / "tensorboard")


def wait(job: Job, condition) -> None:
    """Until the condition holds. Fails if the job ends before, or after ``END_S``."""
    end = time.monotonic() + END_S
    while True:
        state = job.state()  # before the condition, which the job's end may fulfil
        if condition():
            return
        assert state not in ENDED and time.monotonic() < end, state + job.text()[-3000:]
        time.sleep(0.5)


def until_completed(job: Job) -> None:
    wait(job, lambda: job.state() == "COMPLETED")


def test_a_job_that_is_stopped_before_its_time_limit_and_loses_a_node_gives_the_same_curve(
    tmp_path,
):
    job = Job(tmp_path / "interrupted", REQUEUE="1")

    wait(job, lambda: job.iteration() >= 10)
    slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=2")  # the signal is due soon
    wait(job, lambda: "the job is queued again" in job.text())
    slurm("scontrol", "update", f"JobId={job.number}", "TimeLimit=60")
    stopped = job.iteration()
    wait(job, lambda: job.iteration() > stopped + 60)  # behind a checkpoint of SAVE_INTERVAL
    slurm("scontrol", "update", "NodeName=node1", "State=DOWN", "Reason=test")
    wait(job, lambda: job.starts() == 3 and job.state() == "RUNNING")
    nodes = re.findall(r" NodeList=(\S+)", slurm("scontrol", "show", "job", job.number))
    until_completed(job)
    whole = Job(tmp_path / "whole")
    until_completed(whole)

    assert 10 <= stopped < ITERATIONS
    assert "SIGUSR1 came: the ranks save" in job.text()
    assert (job.folder / "run" / f"iter_{stopped:07d}").is_dir()
    assert nodes == ["node[2-3]"]  # the job's first node was lost; another is the meeting point
    assert whole.starts() == 1
    assert whole.losses().keys() == set(range(1, ITERATIONS + 1))
    assert job.losses() == whole.losses()


def test_the_last_error_of_a_rank_is_the_jobs_last_word(tmp_path):
    job = Job(tmp_path, "--no-such-flag")

    wait(job, lambda: job.state() == "FAILED")

    *_, summary, last = job.text().splitlines()
    assert summary.startswith("train.sbatch: error: the step ended with status ")
    assert re.match(r"train\.sbatch: node\d/\S+/error\.json: .*--no-such-flag", last)
    logs = list(
        (tmp_path / "run" / "logs" / f"{job.number}.0").glob("node*/*/attempt_0/0/stderr.log")
    )
    assert len(logs) == 2
