"""The checkpoint to load, held against what was saved, and what happens if it is damaged."""

import argparse
import os
import time
from pathlib import Path

from megatron_scmoe.checkpoints import locate
from megatron_scmoe.checkpoints.checksums import find_damage
from megatron_scmoe.errors import InputError
from megatron_scmoe.platform import rank_store
from megatron_scmoe.platform.command_line import is_first_rank

REFUSE, SKIP = "refuse", "skip"
"""Values of ``--scmoe-damaged-checkpoint``."""

SEEN_WITHIN_S = 60
"""How long a host may take to see a file of another one; NFS remembers for as long by default."""


def find(flag: str, folder: str, args: argparse.Namespace) -> Path:
    """The folder of the iteration to load.

    Each rank reads a share of its bytes. With ``--scmoe-damaged-checkpoint skip`` the ranks agree on
    the newest checkpoint that is whole; the first one renames those that are not, so that training
    does not write over them.

    Args:
        flag: what names the folder.
        args: with ``ckpt_step`` that checkpoint and no other is meant.

    Raises:
        InputError: if it is not whole, and may not be skipped.
    """
    step = args.ckpt_step or None
    if step is not None and locate.tracker_says(folder) == locate.RELEASE:
        raise InputError(
            locate.as_given(flag, folder, step),
            f"its tracker says {locate.RELEASE}, and Megatron loads that, whatever the step",
            f"leave --ckpt-step out, or {locate.how_to_load(folder, step)}",
        )
    checked = getattr(args, "scmoe_verify_checkpoint", False)
    skips = getattr(args, "scmoe_damaged_checkpoint", REFUSE) == SKIP and step is None
    skips |= step is None and _names_none(flag, folder, args)
    skipped: list[tuple[int | str | None, InputError]] = []
    while True:
        try:
            path = locate.find_checkpoint(flag, folder, step, args.ckpt_format)
            if checked:
                _check_bytes(flag, folder, path, step, all_ranks=skips)
            break
        except InputError as error:
            before = locate.complete_before(folder, step, args.ckpt_format) if skips else None
            if before is None:
                raise
            skipped.append((step, error))
            step = before
    if skipped:
        _go_on_from(path, folder, skipped)
    return path


def _names_none(flag: str, folder: str, args: argparse.Namespace) -> bool:
    """Whether a tracker says nothing, or is lost where the run would write over what it named.

    It is empty, or not there at the first save, if its writer was ended just then; the checkpoint was
    complete by then.
    """
    if locate.has_tracker(folder):
        return locate.has_empty_tracker(folder)
    return flag == "--load" and locate.loads_what_it_saves(args)


def step_to_name(args: argparse.Namespace, path: Path) -> dict[str, int]:
    """``ckpt_step``, by which Megatron loads ``path`` where its tracker names another."""
    number = path.name.removeprefix("iter_")
    if args.ckpt_step or not number.isdigit():
        return {}
    named = locate.folder_of(str(path.parent), None)
    return {} if named == path else {"ckpt_step": int(number)}


def _check_bytes(flag: str, folder: str, path: Path, step, all_ranks: bool) -> None:
    """Read this rank's share.

    Raises:
        InputError: if it is damaged; with ``all_ranks`` on all of them, if the share of any is.
    """
    if not (path / ".metadata").is_file():
        return  # Megatron's format "torch"
    rank, ranks = int(os.environ.get("RANK", "0")), int(os.environ.get("WORLD_SIZE", "1"))
    damage = find_damage(path, rank, ranks) or ""
    if all_ranks:
        damage = next(filter(None, rank_store.gather(f"damage of {path}", damage)), "")
    if not damage:
        return
    before = locate.complete_before(folder, step or path.name, "torch_dist")
    accepted = "another folder"
    if before is not None:
        accepted = f"{locate.how_to_load(folder, before)}, the complete checkpoint before it"
    given = locate.as_given(flag, folder, step)
    raise InputError(given, f"the checkpoint is not what was saved: {damage}", accepted)


def _go_on_from(
    path: Path, folder: str, skipped: list[tuple[int | str | None, InputError]]
) -> None:
    """Set aside what is damaged, and name ``path`` where Megatron cannot be told of it otherwise."""
    names_it = locate.folder_of(folder, None) is None or path.name == locate.RELEASE
    rank_store.gather(f"found {path}", "")  # nobody looks at the others any more
    if is_first_rank():
        for flawed, reason in skipped:
            _set_aside(folder, flawed, reason, path)
        if names_it:
            locate.write_tracker(folder, path)  # Megatron ends at an empty one, or begins anew
    rank_store.gather(f"renamed before {path}", "")
    if names_it:
        _wait_until_named(folder, path)


def _set_aside(folder: str, step: int | str | None, error: InputError, instead: Path) -> None:
    """Rename a damaged checkpoint, if any is named, and say so."""
    damaged = locate.folder_of(folder, step)
    told = error.without_advice
    if damaged is not None and damaged.is_dir():
        aside = damaged.with_name(f"{damaged.name}.damaged")
        told += f"; it is {aside.name} now"
        damaged.rename(aside)
    print(f"WARNING: {told}; the run goes on from {instead.name}", flush=True)


def _wait_until_named(folder: str, path: Path) -> None:
    """Wait until this rank sees what the first one wrote: where the file is, Megatron's reading of it
    is a collective, and a rank that sees none would leave the others waiting."""
    deadline = time.monotonic() + SEEN_WITHIN_S
    while not locate.is_named(folder, path):
        if time.monotonic() > deadline:
            raise InputError(
                f"--load {folder}",
                f"the first rank has named {path.name} there, and rank "
                f"{os.environ.get('RANK', '0')} does not see it after {SEEN_WITHIN_S} s",
                "a folder that all hosts share",
            )
        time.sleep(0.2)
