"""``--scmoe-tune``: schedules tried on a run's own first iterations, and the fastest kept.

Schedules are data, and all of them give the same bits. So a run may have another one in each of its
iterations: none is lost, and losses are those of a run that tries nothing.
"""

import argparse
import statistics
import time
from collections.abc import Container, Sequence
from dataclasses import replace
from pathlib import Path
from typing import NamedTuple

import torch
from megatron.core.transformer.transformer_config import TransformerConfig
from megatron.training import get_args, print_rank_0

from megatron_scmoe.config import ScMoEConfig, wanted_slot
from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.model.layer_spec import resolve_schedule
from megatron_scmoe.model.moe_layer import ScMoELayer
from megatron_scmoe.overlap.routed_path import RoutedPath
from megatron_scmoe.overlap.schedule import Schedule, num_slots
from megatron_scmoe.platform.first_rank import ask_first_rank
from megatron_scmoe.platform.megatron_flags import TUNE_FLAG, TUNE_OFF, tune_file
from megatron_scmoe.training.iterations import Iterations
from megatron_scmoe.training.trial_record import Record, choose, conditions, name_of
from megatron_scmoe.validation.rules import validate

WARMUP = 3
"""Iterations before the first trial: kernels are compiled, memory and connections are had."""

ROUNDS = 3
"""Iterations of each schedule, in turns; the median counts."""

clock = time.perf_counter
"""Seconds. The optimizer's gradient norm makes the host wait for the GPU once an iteration, so the
host's time over whole iterations is the GPU's."""


class Candidate(NamedTuple):
    """A schedule to try. Slot ``auto`` is the one that the operators' times have suggested."""

    slot: int | str
    overlap: bool

    @property
    def name(self) -> str:
        """In the log and in the file."""
        return name_of(self.slot, self.overlap)


def candidates(
    scmoe: ScMoEConfig, config: TransformerConfig, given: Container[str]
) -> list[Candidate]:
    """The schedules to try: the run's own first, then what the command line leaves open.

    With captured graphs only those remain that the rules accept beside them.

    Args:
        given: names of the arguments that the command line has.
    """
    slot = wanted_slot(scmoe)
    found = [Candidate(slot, scmoe.overlap)]
    if not scmoe.overlap or config.expert_model_parallel_size == 1:
        return found
    if "scmoe_expert_slot" not in given:
        found += [Candidate(other, True) for other in range(num_slots(scmoe.tap)) if other != slot]
    if "scmoe_overlap" not in given:
        found.append(Candidate(slot, False))
    return [each for each in found if _is_accepted(each, scmoe, config)]


class ScheduleTrial:
    """Gives every pair one schedule after another, and keeps the fastest.

    All ranks call :meth:`attach` together, and hear of the same iterations.

    Args:
        scmoe: the configuration of ScMoE.
        tried: the schedules; the first is the run's own.
        measured_on: what their times depend on.
        warmup: iterations before the first is measured.
        iterations: whose listener this is.
        file: where the record is written, or read if it is there; None for neither.
    """

    def __init__(
        self,
        scmoe: ScMoEConfig,
        tried: Sequence[Candidate],
        measured_on: dict,
        warmup: int,
        iterations: Iterations,
        file: str | None = None,
    ):
        self._scmoe, self._tried, self._measured_on = scmoe, tried, measured_on
        self._warmup, self._iterations, self._file = warmup, iterations, file
        self._paths: list[RoutedPath] = []
        self._own: list[Schedule] = []
        self._queue = _in_turns(len(tried))
        self._samples: list[list[float]] = [[] for _ in tried]
        self._first: int | None = None  # iteration that the run begins with
        self._last = -1
        self._measured_from = 0
        self._began: float | None = None  # when the iteration under trial did
        self._agreement: tuple | None = None
        self._is_over = False

    def attach(self, models: list) -> list:
        """Take the routed paths of this rank's model chunks, and the file's choice if there is one.

        Returns:
            ``models``, as hooks of Megatron's model builder do.
        """
        layers = [m for model in models for m in model.modules() if isinstance(m, ScMoELayer)]
        self._paths = [layer.path for layer in layers]
        self._own = [path.schedule for path in self._paths]
        file, record = self._file, None
        if file is not None:
            record = ask_first_rank(lambda: Record.read(file) if Path(file).exists() else None)
        if record is not None:
            self._is_over = True
            self._set(record.chosen)
            print_rank_0(record.describe(f"from {file}"))
        return models

    def iteration_begins(self, done: int) -> None:
        """Note how long the last iteration took, and choose the schedule of the one that begins.

        Args:
            done: number of iterations that are done.
        """
        if self._is_over:
            return
        now = clock()
        if self._agreement is not None:
            self._conclude()
            return
        if self._first is None:
            self._first = done
            if self._is_too_short(done):
                self._is_over = True
                return
        if self._began is not None and not self._was_disturbed(done):
            self._samples[self._queue.pop(0)].append(now - self._began)
        self._last, self._began = done, None
        if done - self._first < self._warmup:
            return
        self._measured_from = self._measured_from or done + 1
        if self._queue:
            self._set(self._tried[self._queue[0]].name)
            self._began = clock()
        else:
            self._set(self._tried[0].name)
            self._agree()

    def _is_too_short(self, done: int) -> bool:
        needed = self._warmup + len(self._queue) + 2
        left = get_args().train_iters - done
        if left >= needed:
            return False
        print_rank_0(
            f"> schedules are not tried ({TUNE_FLAG}): it takes {needed} iterations, "
            f"and the run has {left}"
        )
        return True

    def _was_disturbed(self, done: int) -> bool:
        """Whether the last iteration did more than train; on all ranks alike."""
        args = get_args()
        intervals = [args.manual_gc_interval if args.manual_gc else None]
        if args.save:
            intervals += [args.save_interval, args.non_persistent_save_interval]
        return bool(
            self._iterations.evaluated
            or done != self._last + 1
            or any(each and done % each == 0 for each in intervals)
            or (args.profile and args.profile_step_start <= done <= args.profile_step_end)
        )

    def _set(self, name: str) -> None:
        """Give all paths the schedule of this name."""
        candidate = next(each for each in self._tried if each.name == name)
        schedules = self._own
        if candidate != self._tried[0]:
            other = resolve_schedule(replace(self._scmoe, **_settings(candidate)))
            schedules = [other] * len(self._paths)
        for path, schedule in zip(self._paths, schedules, strict=True):
            path.schedule = schedule

    def _agree(self) -> None:
        """Begin to find the slowest rank's times.

        A later pipeline stage hears of an iteration when the first one has sent it something: to wait
        here would be to wait for ever. So the answer is read when the next iteration begins.
        """
        slowest = torch.tensor(self._samples, dtype=torch.float64).cuda()
        work = torch.distributed.all_reduce(
            slowest, op=torch.distributed.ReduceOp.MAX, async_op=True
        )
        self._agreement = slowest, work

    def _conclude(self) -> None:
        slowest, work = self._agreement  # type: ignore[misc]  # the caller has seen it
        work.wait()
        self._is_over = True
        medians = [1000 * statistics.median(rounds) for rounds in slowest.tolist()]
        names = [candidate.name for candidate in self._tried]
        found = Record(
            self._measured_on, dict(zip(names, medians, strict=True)), choose(names, medians)
        )
        self._set(found.chosen)
        print_rank_0(found.describe(f"tried on iterations {self._measured_from} to {self._last}"))
        if self._file is not None and torch.distributed.get_rank() == 0:
            found.write(self._file)


def prepare(
    args: argparse.Namespace,
    scmoe: ScMoEConfig,
    config: TransformerConfig,
    given: Container[str],
    iterations: Iterations,
) -> ScheduleTrial | None:
    """The trial that ``--scmoe-tune`` asks for; None if there is nothing to try.

    Args:
        args: of the run, validated.
        given: names of the arguments that the command line has.

    Raises:
        InputError: for a file that holds something else.
        ScMoEConfigError: for a file that was measured on something else.
    """
    if args.scmoe_tune == TUNE_OFF or args.skip_train:
        return None
    file, tried = tune_file(args), candidates(scmoe, config, given)
    varies = args.step_batch_size_schedule or args.iterations_to_skip
    if len(tried) < 2 or varies:
        if file is not None:
            why = "iterations differ" if varies else f"{tried[0].name} alone is left to the run"
            print_rank_0(
                f"> schedules are not tried ({TUNE_FLAG}): {why}; {file} is neither read nor written"
            )
        return None
    tokens = args.seq_length // args.context_parallel_size
    names = [candidate.name for candidate in tried]
    measured_on = conditions(args, scmoe, config, tokens, names)
    if file is not None and Path(file).exists():
        Record.read(file).check(file, measured_on)
    captures = config.cuda_graph_impl != "none"
    warmup = WARMUP + (config.cuda_graph_warmup_steps if captures else 0)
    made = ScheduleTrial(scmoe, tried, measured_on, warmup, iterations, file)
    iterations.listeners.append(made.iteration_begins)
    return made


def _is_accepted(candidate: Candidate, scmoe: ScMoEConfig, config: TransformerConfig) -> bool:
    try:
        validate(replace(scmoe, **_settings(candidate)), config)
    except ScMoEConfigError:
        return False
    return True


def _settings(candidate: Candidate) -> dict:
    """A candidate as fields of ``ScMoEConfig``; without overlap all slots take the same time."""
    slot = candidate.slot if candidate.overlap or candidate.slot != "auto" else None
    return {"expert_slot": slot, "overlap": candidate.overlap, "operator_times": None}


def _in_turns(number: int) -> list[int]:
    """The order of trials: every round the other way, so that a drift meets all alike."""
    there = list(range(number))
    return [each for turn in range(ROUNDS) for each in (there if turn % 2 == 0 else there[::-1])]
