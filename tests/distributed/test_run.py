"""``python -m megatron_scmoe.run``: a script that knows nothing of ScMoE trains the same model."""

import os
import sys
from functools import partial

import pytest

from megatron_scmoe.config import SPEC
from megatron_scmoe.platform import cpu_backend
from megatron_scmoe.platform.command_line import UsageError
from megatron_scmoe.run import main, missing_flags, split_flags
from tests import harness, small_run
from tests.small_run import EP2
from tests.tools import REPOSITORY

SCRIPT = str(REPOSITORY / "tests" / "scripts" / "pretrain_as_megatron.py")
SCMOE = ("--scmoe-tap", "pos3", "--scmoe-combine", "add")
FLAGS = [*small_run.MODEL, *small_run.STEPS, "--mock-data", "--train-iters", "2"]

run_script = partial(harness.run_pretrain, script=SCRIPT)


@pytest.fixture(scope="module")
def own():
    run = harness.run_pretrain([*FLAGS, *SCMOE, *EP2], world_size=2)
    assert run.status == 0, run.output
    return run


def test_same_losses_as_the_own_entry_point(own):
    run = run_script([*FLAGS, *SCMOE, *EP2], world_size=2)
    assert run.status == 0, run.output
    assert sorted(own.losses) == [1, 2]
    assert run.losses == own.losses
    assert "> on the CPU over gloo; added where not given: --spec megatron_scmoe.spec" in run.output
    assert "CPU RNG state changed" not in run.output  # once for each dropout


def test_flags_may_stand_in_the_environment(own):
    run = run_script([*FLAGS, *EP2], world_size=2, environment={"SCMOE_ARGS": " ".join(SCMOE)})
    assert run.losses == own.losses


def test_another_tap_is_another_model(own):
    run = run_script([*FLAGS, *EP2, "--scmoe-tap", "pos2", "--scmoe-combine", "add"], world_size=2)
    assert run.status == 0
    assert run.losses != own.losses


@pytest.mark.parametrize(
    ("flags", "told"),
    [
        (("--scmoe-expert-slot", "auto"), "--scmoe-expert-slot auto under --spec"),  # in pretrain()
        (("--scmoe-expert-slot", "9"), "--scmoe-expert-slot 9: "),
        (("--no-such-flag",), "unrecognized arguments: --no-such-flag (see --help)"),
        (("--expert-model-parallel-size", "3"), "Number of experts should be a multiple"),
        (("--num-layers", "x"), "argument --num-layers: invalid int value: 'x'"),
    ],
)
def test_refusals_are_one_line(flags, told):
    run = run_script([*FLAGS, *flags])
    assert run.status == 2, run.output
    assert run.error.startswith(told)
    assert run.output.splitlines()[-1].startswith("pretrain_as_megatron.py: error: ")
    assert "Traceback" not in run.output


def test_bug_in_the_script_keeps_its_traceback(tmp_path):
    script = tmp_path / "script.py"
    script.write_text("def train():\n    raise ValueError('a bug')\n\n\ntrain()\n")
    run = harness.run_pretrain([], script=str(script))
    assert run.status == 1
    assert "Traceback" in run.output
    assert f'{script}", line 2, in train' in run.output
    assert run.output.splitlines()[-1] == "ValueError: a bug"


def test_script_that_is_not_there(tmp_path):
    run = harness.run_pretrain([], script=str(tmp_path / "absent.py"))
    assert run.status == 2
    assert f"{tmp_path}/absent.py: there is no such script" in run.error


@pytest.mark.parametrize(
    "flag",
    [
        "--scmoe-tune startup",
        "--scmoe-damaged-checkpoint skip",
        "--scmoe-log-overlap-interval 1",
        "--no-scmoe-verify-checkpoint",
    ],
)
def test_flags_of_a_loop_that_the_script_has_not(flag, tmp_path):
    (tmp_path / "script.py").write_text("")
    run = harness.run_pretrain(flag.split(), script=str(tmp_path / "script.py"))
    assert run.status == 2
    assert run.error.startswith(f"{flag.split()[0]}: the script has a loop of its own")


@pytest.mark.parametrize(
    ("given", "told"),
    [
        ("--scmoe-tap 'pos1", "--scmoe-tap 'pos1: no closing quotation"),
        ("--scmoe-tap pos1 --num-layers 8", "unrecognized arguments: --num-layers 8"),
        (
            "--scmoe-tapp pos1",
            "unrecognized arguments: --scmoe-tapp pos1; the nearest: --scmoe-tap",
        ),
        ("--scmoe-tune off", "unrecognized arguments: --scmoe-tune off"),
        ("--scmoe-tap pos9", "argument --scmoe-tap: invalid choice: 'pos9'"),
    ],
)
def test_what_the_environment_holds_is_checked_first(given, told, tmp_path):
    (tmp_path / "script.py").write_text("print('not reached')")
    run = harness.run_pretrain(
        [], script=str(tmp_path / "script.py"), environment={"SCMOE_ARGS": given}
    )
    assert run.status == 2
    assert run.error.startswith(f"$SCMOE_ARGS: {told}")
    assert "accepted: --scmoe-* flags of the model" in run.error
    assert "not reached" not in run.output


def test_another_spec_is_refused(tmp_path):
    (tmp_path / "script.py").write_text("")
    other = ["--spec", "another.module", "spec", "--lr", "1"]
    run = harness.run_pretrain(other, script=str(tmp_path / "script.py"))
    assert (run.status, run.error) == (
        2,
        "--spec another.module: its model has no ScMoE; accepted: leave the flag out",
    )
    own = ["--spec", *SPEC, "--lr", "1"]
    assert harness.run_pretrain(own, script=str(tmp_path / "script.py")).status == 0


def test_modules_beside_the_script_go_first(tmp_path):
    (tmp_path / "beside.py").write_text("print('imported', __name__)")
    (tmp_path / "script.py").write_text("import beside, sys\nprint(sys.argv[1:3])")
    run = harness.run_pretrain(["--flag", "1"], script=str(tmp_path / "script.py"))
    assert run.status == 0
    assert "imported beside\n['--flag', '1']\n" in run.output


@pytest.mark.parametrize(
    ("words", "scmoe", "others"),
    [
        ("--scmoe-tap pos1 --lr 1", "--scmoe-tap pos1", "--lr 1"),
        ("--lr 1 --no-scmoe-overlap --bf16", "--no-scmoe-overlap", "--lr 1 --bf16"),
        (
            "--scmoe-copy-engine-all-to-alls dispatch combine --x",
            "--scmoe-copy-engine-all-to-alls dispatch combine",
            "--x",
        ),
        ("--scmoe-active-experts -1 --x -1", "--scmoe-active-experts -1", "--x -1"),
        ("--scmoe-tap=pos1", "--scmoe-tap=pos1", ""),
        ("", "", ""),
    ],
)
def test_flags_are_told_apart(words, scmoe, others):
    assert split_flags(words.split()) == (scmoe.split(), others.split())


def test_given_flags_are_not_added():
    given = ["--spec", *SPEC, "--distributed-backend=gloo", "--seq-length=32"]
    added = missing_flags(given)
    assert "--spec" not in added
    assert "--distributed-backend" not in added
    place = added.index("--max-position-embeddings")
    assert added[place + 1] == "32"
    assert ("--transformer-impl" in added) == cpu_backend.is_enabled()


def test_without_a_script_nothing_is_run(monkeypatch):
    monkeypatch.setattr(sys, "argv", ["megatron_scmoe.run"])
    with pytest.raises(UsageError, match="no script is named; accepted: torchrun"):
        main()


def test_environment_of_this_process_is_left_alone():
    assert "SCMOE_ARGS" not in os.environ


def test_an_asynchronous_save_needs_a_guarded_script(tmp_path, monkeypatch):
    script = tmp_path / "train.py"
    script.write_text("raise SystemExit('it trains')\n")
    monkeypatch.setattr(sys, "argv", ["run", str(script), "--async-save"])
    with pytest.raises(UsageError, match=f"^--async-save: its process imports {script}, which "):
        main()
