"""NaN and Inf are found, and finite results are judged by one transfer to the host an iteration."""

import math
from collections import Counter
from types import SimpleNamespace

import pytest
import torch
from megatron.core import rerun_state_machine
from megatron.core.rerun_state_machine import RerunMode, RerunStateMachine

from megatron_scmoe.training import finite_checks
from megatron_scmoe.training.finite_checks import FiniteChecks, NotFiniteError, told_in_one_line

READS = ("__bool__", "item", "tolist", "__float__", "cpu")
"""Methods of a tensor that make the host wait for the device."""


@pytest.fixture
def reads(monkeypatch):
    """Counts how often the host has read a tensor."""
    count: Counter[str] = Counter()

    def counted(name):
        plain = getattr(torch.Tensor, name)

        def read(tensor, *args, **kwargs):
            count[name] += 1
            return plain(tensor, *args, **kwargs)

        return read

    for name in READS:
        monkeypatch.setattr(torch.Tensor, name, counted(name))
    return count


def machine(mode: RerunMode = RerunMode.DISABLED, kind: type = FiniteChecks) -> RerunStateMachine:
    made = kind(mode=mode)
    made._reduce_any = lambda value: value  # one rank
    made.first_iteration_complete = True
    return made


def iterate(checks: RerunStateMachine, *values: float) -> list[str]:
    """One iteration, repeated if the machine asks for it; what was done with the results."""
    done = []
    while checks.should_run_forward_backward(None):
        for number, value in enumerate(values):
            result = torch.tensor(value)
            for reject, what in ((torch.isnan, "NaN"), (torch.isinf, "Inf")):
                checks.validate_result(result, reject, f"{what} in result {number}")
        done.append("run")
    _, ends, status = checks.should_checkpoint_and_exit()
    return [*done, f"ends with {status}" if ends else "step"]


@pytest.mark.parametrize("mode", [RerunMode.DISABLED, RerunMode.VALIDATE_RESULTS])
def test_finite_results_are_judged_by_one_read(mode, reads):
    checks = machine(mode)
    for iteration in range(1, 4):
        assert iterate(checks, *range(20)) == ["run", "step"]
        assert reads.total() == iteration


def test_megatrons_own_reads_each_result_twice(reads):
    assert iterate(machine(kind=RerunStateMachine), *range(20)) == ["run", "step"]
    assert reads.total() == 40


@pytest.mark.parametrize("value, what", [(math.nan, "NaN"), (math.inf, "Inf"), (-math.inf, "Inf")])
def test_the_first_that_is_not_finite_is_named_in_megatrons_words(value, what):
    def raised_by(kind: type) -> str:
        with pytest.raises(RuntimeError) as raised:
            iterate(machine(kind=kind), 1.0, value, math.nan)
        return str(raised.value)

    ours, megatrons = raised_by(FiniteChecks), raised_by(RerunStateMachine)
    assert ours.startswith(megatrons)
    assert f"message='{what} in result 1'" in ours
    assert "iteration 1: " in ours


def test_nan_is_found_in_bf16_too():
    checks = machine()
    checks.should_run_forward_backward(None)
    checks.validate_result(torch.tensor(1.0), torch.isnan, "fp32")
    checks.validate_result(torch.tensor([math.nan], dtype=torch.bfloat16), torch.isnan, "bf16")
    with pytest.raises(NotFiniteError, match="message='bf16'"):
        checks.should_run_forward_backward(None)


@pytest.mark.parametrize("folder", ["checkpoints", None])
def test_a_checkpoint_is_saved_where_there_is_a_folder(monkeypatch, folder):
    monkeypatch.setattr(finite_checks, "get_args", lambda: SimpleNamespace(save=folder))
    checks = machine(RerunMode.VALIDATE_RESULTS)
    iterate(checks, math.nan)
    assert checks.should_checkpoint_and_exit() == (folder is not None, True, 16)


def test_an_iteration_is_repeated_where_megatron_repeats_it(monkeypatch):
    monkeypatch.setattr(finite_checks, "get_args", lambda: SimpleNamespace(save=None))
    ours = machine(RerunMode.VALIDATE_RESULTS)
    megatrons = machine(RerunMode.VALIDATE_RESULTS, RerunStateMachine)
    for checks in (ours, megatrons):
        assert iterate(checks, 1.0, 2.0) == ["run", "step"]
        assert iterate(checks, 1.0, math.nan, math.inf) == ["run", "run", "ends with 16"]
    assert ours.failed_validation_call == megatrons.failed_validation_call
    assert "result 1" in ours.failed_validation_call.caller.message


def test_evaluation_is_judged_at_once():
    with pytest.raises(NotFiniteError, match="in evaluation"):
        machine().validate_result(torch.tensor(math.nan), torch.isnan, "in evaluation")


def test_other_checks_are_judged_at_once_and_after_what_waits():
    checks = machine(RerunMode.VALIDATE_RESULTS)
    checks.should_run_forward_backward(None)
    checks.validate_result(torch.tensor(math.nan), torch.isnan, "first")
    checks.validate_result(torch.tensor(5.0), lambda value: bool(value > 1), "second", fatal=False)
    assert checks.failed_validation_call.caller.message == "first"


def test_megatron_builds_it_unless_nothing_is_checked():
    for is_asked_for, kind in ((True, FiniteChecks), (False, RerunStateMachine)):
        finite_checks.install(is_asked_for)
        rerun_state_machine.destroy_rerun_state_machine()
        assert type(rerun_state_machine.get_rerun_state_machine()) is kind
    rerun_state_machine.destroy_rerun_state_machine()


@pytest.mark.parametrize("status", [16, 17])
def test_an_end_after_a_repetition_is_told_in_one_line(status):
    with pytest.raises(NotFiniteError, match="Unexpected result") as raised, told_in_one_line():
        raise SystemExit(status)
    assert raised.value.status == status
    assert "\n" not in str(raised.value)


@pytest.mark.parametrize("status", [0, 3, None])
def test_other_ends_are_left_alone(status):
    with pytest.raises(SystemExit), told_in_one_line():
        raise SystemExit(status)
