"""Where in a folder Megatron keeps a checkpoint, and whether its files are whole."""

import json
import os
import zipfile
from collections.abc import Sequence
from pathlib import Path

from megatron.training.checkpointing import get_checkpoint_name, get_checkpoint_tracker_filename

from megatron_scmoe.checkpoints import rank_files
from megatron_scmoe.checkpoints.dcp_metadata import find_flaw_of_files, read_metadata
from megatron_scmoe.checkpoints.identify import HUGGING_FACE, what_is
from megatron_scmoe.errors import NOT_JSON, InputError, reason_of
from megatron_scmoe.platform.atomic_write import atomic_write

PRETRAINED = "--pretrained-checkpoint"

RELEASE = "release"
"""What Megatron calls a model without a run: its folder, and the word in the tracker."""


def find_checkpoint(
    flag: str, folder: str, step: int | str | None = None, ckpt_format: str = "torch_dist"
) -> Path:
    """The folder of one complete checkpoint below ``folder``, which ``flag`` names.

    Args:
        step: its iteration, or "release"; None for the last one.

    Raises:
        InputError: if there is none, or files of it are missing or cut off.
    """
    given = as_given(flag, folder, step)
    needs_tracker = step is None or flag == PRETRAINED  # there Megatron asks for it with a step too
    has_none = step != RELEASE and not _steps(folder)
    if not has_tracker(folder) and (needs_tracker or has_none):
        raise InputError(given, *_absence(flag, folder, ckpt_format))
    if step is None:
        step = _read_tracker(flag, folder)
    path = _step_folder(folder, step)
    flaw = _find_flaw(path, ckpt_format)
    if flaw is not None:
        nearest = _nearest_complete(folder, step, ckpt_format)
        accepted = "another folder; no checkpoint in this one is complete"
        if nearest is not None:
            accepted = f"{how_to_load(folder, nearest)}, the nearest complete checkpoint"
        raise InputError(given, f"the checkpoint is not complete: {flaw}", accepted)
    return path


def named_checkpoint(args) -> tuple[str, str] | None:
    """The flag that names the checkpoint to load, and its folder; None if training begins anew.

    Raises:
        InputError: if ``--load`` names no checkpoint, and this is not the first start of a job that
            loads what it saves.
    """
    flag, folder = "--load", args.load
    has_any = folder is not None and _has_any(folder, args.ckpt_format)
    if folder is not None and "://" not in folder and not has_any:
        _check_first_start(folder, args)
        if args.pretrained_checkpoint is None:
            return None  # Megatron says so and begins at random
    if args.pretrained_checkpoint is not None and not has_any:
        flag, folder = PRETRAINED, args.pretrained_checkpoint
    if folder is None or "://" in folder:
        return None
    return flag, folder


def loads_what_it_saves(args) -> bool:
    """Whether ``--load`` and ``--save`` name one folder: a job that goes on by itself."""
    if args.load is None or args.save is None:
        return False
    return os.path.realpath(args.load) == os.path.realpath(args.save)


def is_iteration(folder: str) -> bool:
    """Whether ``folder`` is the folder of one iteration, not what ``--save`` named."""
    return not has_tracker(folder) and is_distributed(Path(folder))


def is_distributed(folder: Path) -> bool:
    """Whether an iteration's folder is of torch_dist, whole or not."""
    return any((folder / name).is_file() for name in (".metadata", "metadata.json"))


def check_iteration(flag: str, folder: str) -> Path:
    """``folder`` as a path, if it is one complete torch_dist checkpoint.

    Raises:
        InputError: if files of it are missing or cut off.
    """
    flaw = _find_flaw(Path(folder), "torch_dist")
    if flaw is not None:
        raise InputError(
            f"{flag} {folder}", f"the checkpoint is not complete: {flaw}", "another folder"
        )
    return Path(folder)


def as_given(flag: str, folder: str, step: int | str | None) -> str:
    """How a command line names a checkpoint."""
    return f"{flag} {folder}" + (f" --ckpt-step {step}" if step and step != RELEASE else "")


def how_to_load(folder: str, step: int | str) -> str:
    """What to type to load a checkpoint that the tracker does not name."""
    if RELEASE in (step, tracker_says(folder)):
        return f"echo {step} > {get_checkpoint_tracker_filename(folder)}"
    return f"--ckpt-step {step}"


def last_complete(folder: str) -> int | str | None:
    """The newest complete torch_dist checkpoint in ``folder``, whatever the tracker says.

    Its iteration; "release" where no iteration is complete.
    """
    return _nearest_complete(folder, float("inf"), "torch_dist")


def complete_before(folder: str, step: int | str | None, ckpt_format: str) -> int | str | None:
    """The newest complete checkpoint before ``step``; before the one of the tracker if it is None.

    "release" is the oldest, unless the tracker names it.

    Args:
        step: its iteration, or the name of its folder.
    """
    word = tracker_says(folder)
    if step == RELEASE != word:
        return None
    number = _number(word) if step is None else _number(str(step).removeprefix("iter_"))
    earlier: list[int | str] = []
    earlier += sorted((s for s in _steps(folder) if number is None or s < number), reverse=True)
    if word != RELEASE:
        earlier.append(RELEASE)
    return _first_complete(folder, earlier, ckpt_format)


def finished_after(folder: str, step: int) -> list[int]:
    """The later iterations whose checkpoints were written to their end, in order."""
    later = sorted(number for number in _steps(folder) if number > step)
    last_files = ("metadata.json", "mp_rank_*/*.pt")
    return [n for n in later if any(any(_step_folder(folder, n).glob(f)) for f in last_files)]


def has_tracker(folder: str) -> bool:
    """Whether the file is there that names the last iteration."""
    return os.path.isfile(get_checkpoint_tracker_filename(folder))


def has_empty_tracker(folder: str) -> bool:
    """Whether it is there, and says nothing."""
    return has_tracker(folder) and not tracker_says(folder)


def write_tracker(folder: str, checkpoint: Path) -> None:
    """Name the last checkpoint, by its folder."""
    with atomic_write(Path(get_checkpoint_tracker_filename(folder))) as [file]:
        file.write_text(_word_of(checkpoint))


def is_named(folder: str, checkpoint: Path) -> bool:
    """Whether the tracker names this checkpoint, as far as this host can see.

    A host may remember of a shared file system that a file was not there. Listing the folder makes
    it look again.
    """
    os.listdir(folder)
    return tracker_says(folder) == _word_of(checkpoint)


def folder_of(folder: str, step: int | str | None) -> Path | None:
    """The folder of a checkpoint, or of the iteration that the tracker names; None if it names none."""
    if step is None:
        step = _number(tracker_says(folder))
    return None if step is None else _step_folder(folder, step)


def _word_of(checkpoint: Path) -> str:
    """What a tracker says that names this folder."""
    name = checkpoint.name
    return name if name == RELEASE else str(int(name.removeprefix("iter_")))


def _number(word: str) -> int | None:
    return int(word) if word.isascii() and word.isdigit() else None


def _has_any(folder: str, ckpt_format: str) -> bool:
    """Whether there is something to go on from: a tracker may be lost, and checkpoints be there."""
    return has_tracker(folder) or _nearest_complete(folder, RELEASE, ckpt_format) is not None


def _check_first_start(folder: str, args) -> None:
    """Refuse ``--load`` of a folder without a checkpoint, but for a job that has saved none yet."""
    reason, accepted = _absence("--load", folder, args.ckpt_format)
    if _other_kind("--load", folder) is None:
        needs_one = args.exit_on_missing_checkpoint or args.ckpt_step
        if not loads_what_it_saves(args):
            accepted += ", or what --save names: a job begins there, and goes on from there"
        elif args.pretrained_checkpoint is not None or not needs_one:
            return  # with --use-checkpoint-args too: then the flags describe the model
    raise InputError(as_given("--load", folder, args.ckpt_step), reason, accepted)


def _absence(flag: str, folder: str, ckpt_format: str) -> tuple[str, str]:
    """Why nothing is loaded from a folder without a tracker, and what is accepted."""
    tracker = get_checkpoint_tracker_filename(folder)
    newest = _nearest_complete(folder, float("inf"), ckpt_format)
    if newest is not None:
        return f"{tracker} is missing", _fill_in(tracker, newest)
    nothing = f"there is no checkpoint (no {tracker})"
    return _other_kind(flag, folder) or (nothing, "a folder that was a --save")


def _other_kind(flag: str, folder: str) -> tuple[str, str] | None:
    """What a folder is that was no ``--save``, and what is accepted in its place; None if unknown."""
    path = Path(folder) if Path(folder).name not in ("", "..") else Path(folder).resolve()
    if is_iteration(folder) or any(path.glob("mp_rank_*/*.pt")):
        accepted = "the folder above it, if that was a --save"
        if path.name == RELEASE:
            accepted = f"{flag} {path.parent}"
        elif path.name.startswith("iter_") and path.name[5:].isdigit():
            accepted = f"{flag} {path.parent} --ckpt-step {int(path.name[5:])}"
        return "it is one iteration, not a --save", accepted
    if what_is(path) == HUGGING_FACE:
        convert = f"tools/convert.py hf-to-megatron --input {folder} --save FOLDER"
        return "it is a Hugging Face model", f"a folder that was a --save: {convert} writes one"
    return None


def _fill_in(tracker: str, nearest: int | str | None) -> str:
    accepted = "the number of a complete checkpoint in it"
    if nearest == RELEASE:
        accepted = "the name of the complete checkpoint in it"
    return accepted if nearest is None else f"{accepted}: echo {nearest} > {tracker}"


def tracker_says(folder: str) -> str:
    """What it holds; nothing if it is missing."""
    if not has_tracker(folder):
        return ""
    return Path(get_checkpoint_tracker_filename(folder)).read_text(errors="replace").strip()


def _read_tracker(flag: str, folder: str) -> int | str:
    """The iteration of the last complete checkpoint, or "release"."""
    file = get_checkpoint_tracker_filename(folder)
    word = tracker_says(folder)
    number = _number(word)
    if word == RELEASE or number is not None:
        return RELEASE if number is None else number
    nearest = _nearest_complete(folder, float("inf"), "torch_dist")
    raise InputError(
        f"{flag} {folder}",
        f"{file} names no iteration (it holds {word[:20]!r})",
        _fill_in(file, nearest),
    )


def _step_folder(folder: str, step: int | str) -> Path:
    release = step == RELEASE
    return Path(get_checkpoint_name(folder, 0 if release else step, release, return_base_dir=True))


def _nearest_complete(folder: str, step: float | str, ckpt_format: str) -> int | str | None:
    """The complete checkpoint nearest to ``step``: an earlier one, a later one, or "release"."""
    found = _steps(folder)
    wanted = float("inf") if isinstance(step, str) else step
    earlier = sorted((s for s in found if s < wanted), reverse=True)
    later = sorted(s for s in found if s > wanted)
    return _first_complete(folder, [*earlier, *later, RELEASE], ckpt_format)


def _steps(folder: str) -> list[int]:
    """The iterations that have a folder, in no order."""
    return [int(p.name[5:]) for p in Path(folder).glob("iter_*") if p.name[5:].isdigit()]


def _first_complete(folder: str, steps: Sequence[int | str], ckpt_format: str) -> int | str | None:
    complete = (s for s in steps if not _find_flaw(_step_folder(folder, s), ckpt_format))
    return next(complete, None)


def _find_flaw(folder: Path, ckpt_format: str) -> str | None:
    """What a checkpoint lacks, as far as names and sizes tell; None if it is complete."""
    if not folder.is_dir():
        return f"there is no folder {folder}"
    whole_files = [*folder.glob("mp_rank_*/*.pt"), *folder.glob("common.pt")]
    for file in sorted(whole_files):  # torch.save writes an archive; its end is its directory
        if not zipfile.is_zipfile(file):
            return f"{file} is truncated ({file.stat().st_size} bytes)"
    distributed = is_distributed(folder)
    if not distributed and any(file.name != "common.pt" for file in whole_files):
        return rank_files.find_missing(folder)  # Megatron's format "torch"
    if ckpt_format != "torch_dcp":  # written last
        try:
            fields = json.loads((folder / "metadata.json").read_text())
        except (OSError, *NOT_JSON) as error:
            return f"{folder / 'metadata.json'} is missing or unreadable ({reason_of(error)})"
        if not isinstance(fields, dict):
            return f"{folder / 'metadata.json'} holds no fields"
    return _find_flaw_of_shards(folder)


def _find_flaw_of_shards(folder: Path) -> str | None:
    """Compare the files of a distributed checkpoint with the byte ranges in its ``.metadata``."""
    try:
        metadata = read_metadata(folder)
    except FileNotFoundError:
        return f"{folder / '.metadata'} is missing"
    except Exception as error:  # what a damaged pickle raises is anyone's guess
        return f"{folder / '.metadata'} is unreadable ({reason_of(error)})"
    return find_flaw_of_files(folder, metadata)
