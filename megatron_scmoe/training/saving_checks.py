"""What would stop a run as it saves, said before it starts."""

import argparse
import shutil
import signal
from pathlib import Path

import torch
from megatron.training.theoretical_memory_usage import compute_weight_and_optimizer_memory
from megatron.training.utils import print_rank_0

from megatron_scmoe.arguments import in_flags
from megatron_scmoe.checkpoints import locate
from megatron_scmoe.errors import RunError
from megatron_scmoe.platform.command_line import is_first_rank
from megatron_scmoe.training.saved_run import SavedRun


def check_flags(args: argparse.Namespace) -> None:
    """Check parsed flags, before Megatron judges them.

    Raises:
        RunError: at the first that would stop the run, or save nothing.
    """
    if args.save is None:
        for name in ("save_interval", "async_save", "save_retain_interval", "log_progress"):
            if getattr(args, name):
                raise RunError(
                    in_flags(name, getattr(args, name)), "nothing is saved", "--save FOLDER with it"
                )
        stops = [
            in_flags(name, getattr(args, name))
            for name in ("exit_signal_handler", "exit_interval", "exit_duration_in_mins")
            if getattr(args, name)
        ]
        if stops and is_first_rank():
            print(f"WARNING: {stops[0]} without --save: what was trained is lost then", flush=True)
    _check_conversion(args)
    if args.exit_signal != signal.SIGTERM and not args.exit_signal_handler:
        raise RunError(
            in_flags("exit_signal", args.exit_signal),
            "nobody waits for the signal",
            "--exit-signal-handler with it",
        )
    _warn_of_other_checkpoints(args)
    if args.async_save and args.ckpt_format == "torch":
        raise RunError(
            "--async-save with --ckpt-format torch",
            "training waits while Megatron writes this format",
            "--ckpt-format torch_dist, or leave out --async-save",
        )
    kept, interval = args.save_retain_interval, args.save_interval
    if args.save is not None and kept and kept % interval:
        raise RunError(
            f"--save-retain-interval {kept}",
            "it picks those to keep among the checkpoints saved",
            f"a multiple of --save-interval {interval}",
        )
    if args.non_persistent_ckpt_type == "local" and args.non_persistent_local_ckpt_dir is None:
        raise RunError(
            "--non-persistent-ckpt-type local",
            "each rank saves on its own machine, and there is no folder for it",
            "--non-persistent-local-ckpt-dir FOLDER with it",
        )
    if args.non_persistent_save_interval and args.non_persistent_ckpt_type is None:
        raise RunError(
            f"--non-persistent-save-interval {args.non_persistent_save_interval}",
            "it has no kind of checkpoint to save",
            "--non-persistent-ckpt-type global with it",
        )


def _check_conversion(args: argparse.Namespace) -> None:
    """``--ckpt-convert-format``: load, save in another format, and end."""
    target = args.ckpt_convert_save
    if args.ckpt_convert_format is None:
        if target is not None:
            raise RunError(
                f"--ckpt-convert-save {target}",
                "nothing is converted",
                "--ckpt-convert-format torch or torch_dist with it",
            )
        return
    given = f"--ckpt-convert-format {args.ckpt_convert_format}"
    for flag, value in (("--load", args.load), ("--ckpt-convert-save", target)):
        if value is None:
            raise RunError(given, f"there is no {flag}", f"{flag} FOLDER with it")
    if Path(target).exists() and not Path(target).is_dir():
        raise RunError(f"--ckpt-convert-save {target}", "it is a file", "a folder")


def _warn_of_other_checkpoints(args: argparse.Namespace) -> None:
    """Megatron writes over what is there, and calls it incomplete."""
    begins_anew = args.finetune or not locate.loads_what_it_saves(args)
    if args.save is None or not begins_anew:
        return
    if is_first_rank() and locate.has_tracker(args.save):
        print(
            f"WARNING: --save {args.save}: it has checkpoints, the last of iteration "
            f"{locate.tracker_says(args.save)}, which this run does not go on from; it writes over "
            "those of iterations that it saves, too (--load with the same folder, without "
            "--finetune, goes on)",
            flush=True,
        )


def say_what_is_written_over(args: argparse.Namespace, saved: SavedRun) -> None:
    """Of a run that goes on from an earlier checkpoint than the last one in its folder."""
    if not locate.loads_what_it_saves(args):
        return
    begun = 0 if saved.begins_anew(args) else saved.state.get("iteration", 0)
    later = locate.finished_after(args.save, begun)
    if later and not args.finetune:  # of that check_flags() has said it
        print_rank_0(
            f"WARNING: --save {args.save}: the run goes on from {saved.path.name}, and {len(later)} "
            f"later there ({later[0]}{f' to {later[-1]}' * (len(later) > 1)}) are written over where "
            "it saves the same iterations; another --save keeps them"
        )


def check_disk(args: argparse.Namespace) -> None:
    """Check that a checkpoint fits on the disk; on the first rank, which writes there as well.

    Raises:
        RunError: if it does not.
    """
    if args.save is None or "://" in args.save or not is_first_rank():
        return
    existing = Path(args.save).absolute()
    while not existing.exists():
        existing = existing.parent
    needed, free = checkpoint_bytes(args), shutil.disk_usage(existing).free
    if needed > free:
        smaller = "" if args.no_save_optim else ", or --no-save-optim"
        raise RunError(
            f"--save {args.save}",
            f"a checkpoint has about {_gigabytes(needed)}, and {_gigabytes(free)} are free",
            f"a folder on another disk{smaller}",
        )
    iterations = (args.train_iters or 0) - (args.iteration if hasattr(args, "iteration") else 0)
    number = -(-iterations // args.save_interval)
    if number * needed > free:
        print(
            f"WARNING: --save {args.save}: {number} checkpoints of about {_gigabytes(needed)} will be "
            f"written, and {_gigabytes(free)} are free; the run stops when the disk is full",
            flush=True,
        )


def checkpoint_bytes(args: argparse.Namespace) -> float:
    """About how many bytes one checkpoint of the whole model takes, from validated arguments."""
    whole = argparse.Namespace(**vars(args))
    for name in ("tensor", "pipeline", "expert", "expert_tensor"):
        vars(whole)[f"{name}_model_parallel_size"] = 1
    vars(whole).update(
        expert_tensor_parallel_size=1, data_parallel_size=1, use_distributed_optimizer=False
    )
    parameters = compute_weight_and_optimizer_memory(whole) / _MEGATRON_BYTES
    weights = torch.empty((), dtype=args.params_dtype).element_size()
    if args.no_save_optim:
        return parameters * weights
    moments = 4 * {"adam": 2, "sgd": 1}.get(args.optimizer, 2)
    return parameters * (weights + moments + (0 if args.params_dtype == torch.float32 else 4))


_MEGATRON_BYTES = 18
"""For each parameter, in Megatron's estimate for data parallelism without a distributed optimizer."""


def _gigabytes(number: float) -> str:
    return f"{number / 1e9:.3g} GB"
