"""The checkpoint that a run is about to load, and what it says of the run that wrote it."""

import argparse
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from megatron.core import dist_checkpointing

from megatron_scmoe.checkpoints import locate, rank_files
from megatron_scmoe.checkpoints.dcp_metadata import read_metadata
from megatron_scmoe.checkpoints.model_arguments import with_defaults
from megatron_scmoe.checkpoints.torch_dist import read_common
from megatron_scmoe.errors import InputError, reason_of
from megatron_scmoe.training import whole_checkpoint


@dataclass(frozen=True)
class SavedRun:
    """What a checkpoint holds beside tensors; nothing of it is executed.

    Args:
        given: the flag that names it, and its value.
        path: its folder.
        state: its common state; empty if the format is one that Megatron alone reads.
        is_distributed: whether it is a torch_dist checkpoint, not one of Megatron's older "torch".
    """

    given: str
    path: Path
    state: dict[str, Any]
    is_distributed: bool

    @property
    def args(self) -> argparse.Namespace | None:
        """Megatron's arguments of that run, those of ScMoE complete; None if there are none."""
        saved = self.state.get("args")
        return saved if saved is None else with_defaults(saved)

    @property
    def is_release(self) -> bool:
        """Whether it holds a model alone: training begins at iteration 0."""
        return self.path.name == "release"

    def begins_anew(self, args: argparse.Namespace) -> bool:
        """Whether a run of these arguments takes the weights alone and begins at iteration 0."""
        names_weights = self.given.startswith("--pretrained-checkpoint")
        return bool(args.finetune) or self.is_release or names_weights

    def optimizer_states(self) -> set[str]:
        """The kinds of tensors of the optimizer that it holds for parameters: exp_avg, ..."""
        if not self.is_distributed:
            return set()
        keys = read_metadata(self.path).state_dict_metadata
        parts = (key.split("optimizer.state.", 1) for key in keys)
        return {part[1].split(".")[0] for part in parts if len(part) == 2}


def find(args: argparse.Namespace) -> SavedRun | None:
    """The checkpoint that these arguments name and a run of them loads; None if it begins anew.

    Raises:
        InputError: if it is not complete, or ``--load`` names none where one is meant.
        ConversionError: if it cannot be read.
    """
    try:
        named = locate.named_checkpoint(args)
        if named is None:
            return None
        flag, folder = named
        path = whole_checkpoint.find(flag, folder, args)
        is_distributed = dist_checkpointing.check_is_distributed_checkpoint(str(path))
        state = read_common(path) if is_distributed else rank_files.read_common(path)
    except InputError:
        if _may_be_elsewhere(args):
            return None  # there may be a newer one, which only Megatron finds
        raise
    except OSError as error:
        given = f"--load {args.load}"
        if args.load is None:
            given = f"{locate.PRETRAINED} {args.pretrained_checkpoint}"
        reason = f"{error.filename or 'a file of it'}: {reason_of(error)}"
        raise InputError(given, reason, "a folder whose files can be read") from error
    return SavedRun(f"{flag} {folder}", path, state, is_distributed)


def is_first_start(args: argparse.Namespace, saved: SavedRun | None) -> bool:
    """Whether a job that loads what it saves has saved nothing yet.

    Args:
        saved: what :func:`find` has found for ``args``.
    """
    if saved is not None or args.non_persistent_ckpt_type is not None:
        return False
    return locate.loads_what_it_saves(args) and "://" not in args.load


def _may_be_elsewhere(args: argparse.Namespace) -> bool:
    """Whether Megatron looks for a checkpoint that is not persistent, and may find one."""
    if args.non_persistent_ckpt_type != "global":
        return args.non_persistent_ckpt_type is not None
    folder = args.non_persistent_global_ckpt_dir or (args.load and f"{args.load}/non_persistent")
    return bool(folder) and locate.has_tracker(folder)
