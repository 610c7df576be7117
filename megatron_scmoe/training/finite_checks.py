"""NaN and Inf found without stopping the host: all of an iteration are judged together, at its end.

Megatron asks of the loss of each micro-batch and of the norm of each bucket of gradients whether it is
finite (``--check-for-nan-in-loss-and-grad``), and the host waits for each answer. Here the results
stay on the device until forward and backward are over, and one number comes back: how many of them are
not finite. If some are, Megatron's own method judges each, in their order. The optimizer has not begun.
"""

import contextlib
from collections.abc import Callable, Iterator
from typing import Any, NamedTuple

import torch
from megatron.core import rerun_state_machine
from megatron.core.rerun_state_machine import (
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION,
    EXIT_CODE_RESUME_TO_DISAMBIGUATE,
    DataIteratorArgType,
    RerunMode,
    RerunState,
    RerunStateMachine,
)
from megatron.training import get_args
from torch import Tensor

from megatron_scmoe.errors import ScMoEError


class NotFiniteError(ScMoEError, RuntimeError):
    """A loss or a gradient is NaN or Inf; the optimizer has made no step of it."""

    def __init__(self, message: str, status: int = 1):
        super().__init__(message)
        self.status = status


def install(is_asked_for: bool) -> None:
    """Let Megatron build :class:`FiniteChecks` when its loop begins; its own if nothing is checked."""
    kind = FiniteChecks if is_asked_for else RerunStateMachine
    rerun_state_machine.RerunStateMachine = kind


@contextlib.contextmanager
def told_in_one_line() -> Iterator[None]:
    """Say why Megatron's loop ends after it has repeated an iteration; it only logs on the way.

    Raises:
        NotFiniteError: in place of Megatron's ``SystemExit``, with its status (16 or 17).
    """
    try:
        yield
    except SystemExit as stop:
        if isinstance(stop.code, int) and stop.code in _WHY_IT_ENDS:
            raise NotFiniteError(_WHY_IT_ENDS[stop.code], stop.code) from stop
        raise


_WHY_IT_ENDS = {
    EXIT_CODE_RESUME_TO_DISAMBIGUATE: (
        "a loss or gradient was rejected, and again when the iteration was repeated (the log names "
        "it, as 'Unexpected result'); no step was made of it. With --save the state before it is "
        "saved: --load repeats the iteration, on another device if the launcher gives one"
    ),
    EXIT_CODE_FAILED_ON_RESULT_VALIDATION: (
        "a loss or gradient was rejected (the log names it, as 'Unexpected result', and says whether "
        "it came again when the iteration was repeated); no step was made of it: --load goes on from "
        "the last checkpoint"
    ),
}
"""Of each exit status of Megatron's ``--rerun-mode validate_results``."""


class _Check(NamedTuple):
    """The arguments of ``validate_result``."""

    result: Any
    rejection_func: Callable
    message: str
    comparison_func: Callable | None
    tolerance: float
    fatal: bool


class FiniteChecks(RerunStateMachine):
    """Megatron's state machine, whose checks for NaN and Inf wait for the end of the iteration.

    A result that waits must keep its value: give a copy of what is written to later. Judged at once, by
    Megatron's method, is everything else: other checks, evaluation, repeated iterations, and runs
    that collect statistics or inject errors.
    """

    def __init__(self, *args, **kwargs):
        super().__init__(*args, **kwargs)
        self._waiting: list[_Check] = []

    def validate_result(
        self,
        result: Any,
        rejection_func: Callable[[Any], Any],
        message: str,
        comparison_func: Callable[[Any, Any], float] | None = None,
        tolerance: float = 0.0,
        fatal: bool = True,
    ) -> None:
        """As Megatron's.

        Args:
            result: waits if it is one number on the device and ``rejection_func`` is ``torch.isnan``
                or ``torch.isinf``.

        Raises:
            NotFiniteError: where Megatron raises a RuntimeError, for what does not wait.
        """
        check = _Check(result, rejection_func, message, comparison_func, tolerance, fatal)
        if self._may_wait(check):
            self._waiting.append(check)
            return
        # What came earlier is heard first.
        self._hand_over([*self._take(), check])

    def should_run_forward_backward(self, data_iterator: DataIteratorArgType) -> bool:
        """As Megatron's; judges what waits once the first forward and backward are over.

        Raises:
            NotFiniteError: on every rank, with what Megatron says of the first that any rank found
                (``--rerun-mode disabled``; else the iteration is repeated).
        """
        if self.state == RerunState.INITIAL_RUN:
            if self.mode == RerunMode.DISABLED:
                self._stop_all_ranks_if_not_finite(self._take())
            elif self._waiting and _count_not_finite(self._waiting).item():
                self._hand_over(self._take())
            self._waiting = []
        return super().should_run_forward_backward(data_iterator)

    def should_checkpoint_and_exit(self) -> tuple[bool, bool, int]:
        """As Megatron's, which asks for a checkpoint without ``--save`` too, and fails."""
        saves, ends, status = super().should_checkpoint_and_exit()
        return saves and get_args().save is not None, ends, status

    def _may_wait(self, check: _Check) -> bool:
        if self.mode == RerunMode.VALIDATE_RESULTS:
            # Before the first step of the optimizer Megatron judges nothing.
            in_a_mode = (
                self.first_iteration_complete and not self.error_injector.should_inject_errors
            )
        else:
            in_a_mode = self.mode == RerunMode.DISABLED
        return (
            in_a_mode
            and self.state == RerunState.INITIAL_RUN
            and check.rejection_func in (torch.isnan, torch.isinf)
            and isinstance(check.result, Tensor)
            and check.result.is_cuda
            and check.result.numel() == 1
        )

    def _take(self) -> list[_Check]:
        waiting, self._waiting = self._waiting, []
        return waiting

    def _hand_over(self, checks: list[_Check]) -> None:
        for check in checks:
            try:
                super().validate_result(*check)
            except RuntimeError as error:
                if "Unexpected result" not in str(error):  # a failure of the device
                    raise
                raise NotFiniteError(
                    f"{error}; no step was made of it: --load goes on from the last checkpoint"
                ) from error

    def _stop_all_ranks_if_not_finite(self, checks: list[_Check]) -> None:
        """Gradients are reduced by now: what one rank found has spoilt those of the others."""
        count = _count_not_finite(checks)
        is_one_of_many = torch.distributed.is_initialized()
        if is_one_of_many:
            torch.distributed.all_reduce(count)
        if not count.item():
            return
        own = None
        for position, check in enumerate(checks):
            try:
                self._hand_over([check])
            except NotFiniteError as error:
                own = (position, str(error))
                break
        found = [own]
        if is_one_of_many:
            found *= torch.distributed.get_world_size()
            torch.distributed.all_gather_object(found, own)
        # A NaN travels with the tokens: a loss comes before the gradients that it spoils elsewhere.
        if first := min(filter(None, found), default=None):
            raise NotFiniteError(first[1])


@torch.no_grad()
def _count_not_finite(checks: list[_Check]) -> Tensor:
    """How many results are NaN or Inf, on the device (0-dim, int64), in few kernels."""
    results = {id(check.result): check.result for check in checks}.values()
    if not results:
        return torch.zeros((), dtype=torch.int64, device="cuda")
    return (
        torch.stack([each.float().reshape(()) for each in results]).isfinite().logical_not().sum()
    )
