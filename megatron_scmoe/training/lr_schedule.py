"""The schedule of learning rate and weight decay, and the length, of a run that goes on.

Megatron stores the schedule in samples and refuses another one. Some of it lies in the arguments alone,
and the length of ``--train-samples`` is counted as if the run began.
"""

import argparse
from typing import Any

from megatron.core import num_microbatches_calculator as batches
from megatron.core.optimizer_param_scheduler import OptimizerParamScheduler
from megatron.training import training
from megatron.training.utils import print_rank_0

from megatron_scmoe.errors import ScMoEConfigError
from megatron_scmoe.training.optimizer_state import is_loaded
from megatron_scmoe.training.saved_run import SavedRun


def settle(args: argparse.Namespace, saved: SavedRun) -> None:
    """Let a run of another length or batch size go on, by the schedule that its flags describe.

    Megatron refuses it when the checkpoint is loaded, unless ``--override-opt-param-scheduler`` is
    given; this gives it. Another learning rate or style is left to the user.

    Raises:
        ScMoEConfigError: for a schedule that differs in more than its lengths.
    """
    before = saved.state.get("opt_param_scheduler")
    chosen = args.override_opt_param_scheduler or args.use_checkpoint_opt_param_scheduler
    trains = (args.train_iters or args.train_samples) and not args.skip_train
    if trains and args.no_load_optim and not saved.begins_anew(args):
        print_rank_0(
            "> --no-load-optim: the learning rate's schedule begins anew as well, with its warmup, at "
            f"iteration {saved.state.get('iteration', 0)}"
        )
    if before is None or not trains or not is_loaded(args, saved):
        return
    before = before | _not_stored(saved.args)
    if args.use_checkpoint_opt_param_scheduler:
        _take_what_is_not_stored(args, before)
    if chosen:
        return
    mine, done = _schedule(args), before.get("num_steps", 0)
    if done >= mine["lr_warmup_steps"][0]:
        mine.pop("init_lr", None)
    for name, (value, flag) in mine.items():
        if name not in _LENGTHS and before.get(name, value) != value:
            raise ScMoEConfigError(
                f"{flag} {value}",
                f"{saved.path} was trained with {flag} {before[name]}",
                f"{flag} {before[name]}; --override-opt-param-scheduler for this run's flags; "
                "--use-checkpoint-opt-param-scheduler for the checkpoint's",
            )
    changed = {
        name: (before[name], mine[name][0])
        for name in _LENGTHS
        if name in mine and before.get(name, mine[name][0]) != mine[name][0]
    }
    if changed:
        args.override_opt_param_scheduler = True
    if before.get("wd_incr_style") == "constant":
        changed.pop("wd_incr_steps", None)
    if changed:
        told = ", ".join(f"{_LENGTHS[n]} {int(new)} samples, not {int(old)}"
                         for n, (old, new) in changed.items())  # fmt: skip
        print_rank_0(
            f"> the schedule is that of this run's flags, not of the checkpoint: {told} "
            "(--use-checkpoint-opt-param-scheduler keeps the checkpoint's)"
        )
        decay = mine["lr_decay_steps"][0]
        if done >= decay and args.lr_decay_style != "constant":
            print_rank_0(
                f"WARNING: that decay is over, as {int(done)} samples are done: every step will have "
                f"--min-lr {args.min_lr}; --lr-decay-iters makes it longer"
            )


def go_on_from(saved: SavedRun, run: argparse.Namespace) -> None:
    """Make Megatron begin with the checkpoint's weight decay, and count from the iterations done.

    It takes ``--train-samples`` as if each iteration had had this run's batch. Where that was another
    one it would train on more samples than were asked for, or on fewer.
    """
    OptimizerParamScheduler.load_state_dict = _load_state_dict
    if run.train_iters or saved.args is None or saved.begins_anew(run):
        return

    def update_train_iters(args: argparse.Namespace) -> None:
        if args is not run or args.train_iters:
            _count_from_0(args)
            return
        done = saved.state.get("iteration", 0)
        samples = getattr(saved.args, "consumed_train_samples", 0)
        if (rewound := args.override_ckpt_iteration) is not None:
            done, samples = rewound, rewound * args.global_batch_size
        while samples < args.train_samples:
            batches.update_num_microbatches(samples, consistency_check=False)
            samples += batches.get_current_global_batch_size()
            if samples > args.train_samples and not args.step_batch_size_schedule:
                break  # as Megatron counts
            done += 1
        batches.update_num_microbatches(0, consistency_check=False)
        args.train_iters = done
        print_rank_0(f"setting training iterations to {done}")

    training.update_train_iters = update_train_iters


_LENGTHS = {
    "lr_warmup_steps": "warmup of",
    "lr_decay_steps": "decay over",
    "wd_incr_steps": "weight decay increasing over",
    "wsd_decay_steps": "last decay of",
}


def _schedule(args: argparse.Namespace) -> dict[str, tuple[Any, str]]:
    """What Megatron's ``get_optimizer_param_scheduler`` will make of the flags, and their flags."""
    if args.train_iters:
        batch = args.global_batch_size
        total, warmup = args.train_iters * batch, args.lr_warmup_iters * batch
        decay = total if args.lr_decay_iters is None else args.lr_decay_iters * batch
    else:
        total, warmup = args.train_samples, args.lr_warmup_samples
        decay = total if args.lr_decay_samples is None else args.lr_decay_samples
    if args.lr_warmup_fraction is not None:
        warmup = args.lr_warmup_fraction * decay
    same = args.weight_decay_incr_style == "constant"
    stored = {
        "max_lr": (args.lr, "--lr"),
        "min_lr": (args.min_lr, "--min-lr"),
        "lr_decay_style": (args.lr_decay_style, "--lr-decay-style"),
        "wd_incr_style": (args.weight_decay_incr_style, "--weight-decay-incr-style"),
        "start_wd": (args.start_weight_decay, "--weight-decay" if same else "--start-weight-decay"),
        "end_wd": (args.end_weight_decay, "--weight-decay" if same else "--end-weight-decay"),
        "lr_warmup_steps": (warmup, "--lr-warmup-iters"),
        "lr_decay_steps": (decay, "--lr-decay-iters"),
        "wd_incr_steps": (total, "--train-iters"),
    }
    flags = {
        "init_lr": "--lr-warmup-init",
        "lr_wsd_decay_style": "--lr-wsd-decay-style",
        "wsd_decay_steps": "--lr-wsd-decay-iters",
    }
    return stored | {name: (value, flags[name]) for name, value in _not_stored(args).items()}


def _not_stored(args: argparse.Namespace | None) -> dict[str, Any]:
    """What of a run's schedule Megatron keeps in its arguments alone, by the scheduler's names."""
    found: dict[str, Any] = {}
    if args is None:
        return found
    if hasattr(args, "lr_warmup_init"):
        found["init_lr"] = args.lr_warmup_init
    if getattr(args, "lr_decay_style", None) == "WSD":
        found["lr_wsd_decay_style"] = args.lr_wsd_decay_style
        by_batch = args.lr_wsd_decay_iters is not None
        found["wsd_decay_steps"] = (
            args.lr_wsd_decay_iters * args.global_batch_size
            if by_batch
            else args.lr_wsd_decay_samples
        )
    return found


def _take_what_is_not_stored(args: argparse.Namespace, before: dict[str, Any]) -> None:
    """Let a run that keeps the checkpoint's schedule keep that part as well."""
    args.lr_warmup_init = before.get("init_lr", args.lr_warmup_init)
    args.lr_wsd_decay_style = before.get("lr_wsd_decay_style", args.lr_wsd_decay_style)
    if (samples := before.get("wsd_decay_steps")) is None:
        return
    if args.train_samples:
        args.lr_wsd_decay_samples = samples
    else:  # Megatron multiplies it again; a fraction where the batch was another one
        args.lr_wsd_decay_iters = samples / args.global_batch_size


_load_all_but_weight_decay = OptimizerParamScheduler.load_state_dict
_count_from_0 = training.update_train_iters


def _load_state_dict(scheduler: OptimizerParamScheduler, state_dict: dict) -> None:
    """In place of ``OptimizerParamScheduler.load_state_dict``, which sets the weight decay of the first
    iteration before it reads the checkpoint's."""
    _load_all_but_weight_decay(scheduler, state_dict)
    scheduler.step(0)
