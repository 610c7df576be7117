"""``--scmoe-tune``: schedules tried on a run's own iterations, by the pretraining script."""

import json
import re
import sys
import time
from pathlib import Path

import pytest

from megatron_scmoe.model.moe_layer import ScMoELayer
from megatron_scmoe.overlap.schedule import Step
from megatron_scmoe.training import pretrain, schedule_trial
from tests.distributed.test_training import DROPOUT, TINY, train
from tests.harness import run_distributed

ITERATIONS = 22
OWN = "overlapped, slot 1"
NAMES = [OWN, *(f"overlapped, slot {slot}" for slot in (0, 2, 3)), "serial"]


@pytest.fixture(scope="module")
def untuned() -> dict[int, float]:
    """Losses of a run that tries nothing."""
    return train("--scmoe-tune", "off", *DROPOUT, iterations=ITERATIONS).losses


def test_all_schedules_are_tried_and_no_bit_changes(untuned, tmp_path):
    file = tmp_path / "new folder" / "tune.json"
    run = train("--scmoe-tune", str(file), *DROPOUT, iterations=ITERATIONS)
    assert run.losses == untuned
    assert "> schedules tried on iterations 4 to 18 (--scmoe-tune), ms an iteration:" in run.output
    written = json.loads(file.read_text())
    assert list(written["ms"]) == NAMES
    assert all(ms > 0 for ms in written["ms"].values())
    assert kept(run.output) == written["chosen"]

    file.write_text(json.dumps(written | {"chosen": "serial"}))
    run = train("--scmoe-tune", str(file), *DROPOUT, iterations=2)
    assert f"> schedules from {file} (--scmoe-tune)" in run.output
    assert kept(run.output) == "serial"
    assert json.loads(file.read_text())["chosen"] == "serial", "nothing is tried, nothing written"


def kept(output: str) -> str:
    (line,) = (line for line in output.splitlines() if line.endswith("<- kept"))
    return re.split(r"  +", line.strip())[0]


def test_a_slow_schedule_is_not_kept_and_all_ranks_decide_alike(tmp_path):
    launched = {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}  # there is a process group already
    slow = run_distributed(_train_with_slow_schedules, 2, tmp_path / "log", environment=launched)
    first, second = slow
    assert first == second == ["overlapped, slot 2"]


def _train_with_slow_schedules(log: Path) -> list[str]:
    """All schedules but one are slowed on one rank alone; what this rank's paths end with."""
    import torch

    layers, attach = [], schedule_trial.ScheduleTrial.attach

    def attach_and_slow(trial, models):
        layers.extend(m for model in models for m in model.modules() if isinstance(m, ScMoELayer))
        for layer in layers:
            layer.path.on_action = lambda action, path=layer.path: slow(path, action)
        return attach(trial, models)

    def slow(path, action):
        is_fast = path.schedule.overlap and path.schedule.slot - path.schedule.tap == 2
        if torch.distributed.get_rank() == 1 and action.step is Step.EXPERTS and not is_fast:
            time.sleep(0.05)

    schedule_trial.ScheduleTrial.attach = attach_and_slow
    sys.argv = ["pretrain_gpt_scmoe.py", *TINY, "--train-iters", str(ITERATIONS)]
    with log.with_suffix(f".{torch.distributed.get_rank()}").open("w") as sys.stdout:
        pretrain.main()
    schedules = [layer.path.schedule for layer in layers]
    return [schedule_trial.name_of(s.slot - s.tap, s.overlap) for s in schedules]
